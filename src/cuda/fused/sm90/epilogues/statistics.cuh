// The epilogue of forward: each thread carries the running statistics of its four rows through all
// tiles of a row block, so that no logit leaves the registers. Where a cluster turns to another row
// block, each of its two groups of threads leaves one set of partial statistics per row.
#pragma once

#include "core/row_state.h"
#include "cuda/fused/kernels.h"
#include "cuda/fused/sm90/transform.cuh"

namespace cutloss::cuda::fused::sm90 {

// With kAll entropy, zbar and argmax are made, too.
template <bool kAll>
class StatisticsEpilogue {
  static constexpr int kNumbers = kAll ? 5 : 2;  // how many numbers of a row wait

 public:
  // The statistics wait in shared memory, each thread's in a column of its own: the registers are
  // full of sums while a tile is multiplied.
  static constexpr int kWarpBytes = kRowsOfThread * kNumbers * 32 * 4;

  using Facts = TileFacts;

  struct Params {
    LogitTransform transform;
    const int* target;    // (rows), columns of the vocabulary, or -1
    int origin;           // the column of the vocabulary that is this product's first
    float* target_logit;  // (rows), written where the target is among the columns
    Partials partials;
    const float* class_weight;  // (columns), or null for ones
  };

  __device__ StatisticsEpilogue(const Params& params, const CUtensorMap*, char* buffer,
                                Facts& facts, const TileWalk& walk, int cluster, int rank, int turn)
      : p_(params),
        facts_(facts),
        walk_(walk),
        own_(reinterpret_cast<float*>(buffer) + threadIdx.x % 32),
        cluster_(cluster),
        slot_(params.partials.slots == 2 ? turn : 2 * rank + turn) {}

  __device__ __forceinline__ void prepare(int first_row, int first_column, int rows,
                                          int last_column) {
    read_facts(facts_, p_.transform, p_.class_weight, p_.target, p_.origin, first_row, first_column,
               rows, last_column);
  }

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition position, int first_row,
                                       int first_column, int rows, int last_column) {
    if (position.row_block != block_) {
      finish();
      for (int i = 0; i < kRowsOfThread; ++i) put(i, Row{});
      block_ = position.row_block;
      run_ = position.run;
      first_row_ = first_row;
      rows_ = rows;
    }
    const Lane at;
    CUTE_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      const auto z = row_of(sums, i);
      to_logits(z, p_.transform, facts_, facts_.inv_temperature[at.row(i)], first_column,
                last_column);
      Row state = get(i);
      const int target = facts_.target[at.row(i)];
      take_target(z, target, -kInfinity,
                  [&](float logit) { p_.target_logit[first_row + at.row(i)] = logit; });
      add(z, state, first_column);
      if constexpr (kAll) add_zbar(z, state, target);
      put(i, state);
    }
  }

  // Joins the four threads that share a row and stores their statistics.
  __device__ __forceinline__ void finish() {
    if (block_ < 0) return;
    const Lane at;
    const std::int64_t slot = p_.partials.slots * walk_.sharer(run_, cluster_) + slot_;
    for (int i = 0; i < kRowsOfThread; ++i) {
      Row state = get(i);
      for (int lanes = 1; lanes < 4; lanes *= 2) merge(state, from_lane(state, lanes), ExpApprox{});
      const int row = first_row_ + at.row(i);
      if (at.lane % 4 != 0 || row >= rows_) continue;
      const std::int64_t to = p_.partials.index(walk_, run_, slot, row);
      p_.partials.max_and_sum[to] = make_float2(state.max, state.sum);
      if constexpr (kAll) {
        p_.partials.weighted_and_zbar[to] = make_float2(state.weighted_sum, state.zbar);
        p_.partials.weight_and_argmax[to] =
            make_float2(state.weight_seen, __int_as_float(static_cast<int>(state.argmax)));
      }
    }
  }

 private:
  using Row = RowState<float>;  // without kAll the members that it needs stay as they are

  struct ExpApprox {
    __device__ float operator()(float x) const { return exp_approx(x); }
  };

  __device__ __forceinline__ Row get(int i) const {
    const float* from = own_ + i * kNumbers * 32;
    Row row;
    row.max = from[0];
    row.sum = from[32];
    if constexpr (kAll) {
      row.weighted_sum = from[64];
      row.zbar = from[96];
      row.weight_seen = weight_seen_[i];
      row.argmax = __float_as_int(from[128]);
    }
    return row;
  }

  __device__ __forceinline__ void put(int i, const Row& row) {
    float* to = own_ + i * kNumbers * 32;
    to[0] = row.max;
    to[32] = row.sum;
    if constexpr (kAll) {
      to[64] = row.weighted_sum;
      to[96] = row.zbar;
      weight_seen_[i] = row.weight_seen;
      to[128] = __int_as_float(static_cast<int>(row.argmax));
    }
  }

  // Must follow `add`, whose maximum zbar is relative to. `target` is as in take_target, and is
  // left out.
  template <class Z>
  __device__ __forceinline__ void add_zbar(Z z, Row& row, int target) {
    const Lane at;
    const float shift = finite_or_zero(row.max);
    float seen = 0.f, left_out = 0.f;
    take_target(z, target, shift, [&](float) { left_out = facts_.weight[target]; });
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; i += 2) {
      // A weight of 0 leaves an infinite logit out.
      const float2 weight = *reinterpret_cast<const float2*>(facts_.weight + at.column(i));
      if (weight.x != 0.f) row.zbar = fmaf(weight.x, z[i] - shift, row.zbar);
      if (weight.y != 0.f) row.zbar = fmaf(weight.y, z[i + 1] - shift, row.zbar);
      seen += weight.x + weight.y;
    }
    row.weight_seen += seen - left_out;
  }

  template <class Z>
  __device__ __forceinline__ void add(Z z, Row& row, int first_column) {
    float top = z[0];
    CUTE_UNROLL
    for (int i = 1; i < kRowSums; ++i) top = fmaxf(top, z[i]);
    if constexpr (kAll) {
      if (top > row.max) {
        const Lane at;
        CUTE_UNROLL
        for (int i = kRowSums - 1; i >= 0; --i) {  // downwards: the first of equals stays
          if (z[i] == top) row.argmax = p_.origin + first_column + at.column(i);
        }
      }
    }
    top = fmaxf(top, row.max);
    const float shift = top == -kInfinity ? 0.f : top;  // keeps -inf - (-inf) out
    const float old_scale = exp_approx(row.max - shift);
    if constexpr (kAll) {
      const float moved = row.max == -kInfinity ? 0.f : row.max - shift;
      row.weighted_sum = old_scale * fmaf(moved, row.sum, row.weighted_sum);
      row.zbar = fmaf(row.weight_seen, finite_or_zero(row.max) - shift, row.zbar);
    }
    float sum[2] = {row.sum * old_scale, 0.f};
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; ++i) {
      const float t = z[i] - shift;
      const float e = exp_approx(t);
      sum[i % 2] += e;
      if constexpr (kAll) {
        row.weighted_sum = fmaf(e, fmaxf(t, -1e4f), row.weighted_sum);  // 0 * -inf is 0
      }
    }
    row.sum = sum[0] + sum[1];
    row.max = top;
  }

  // The state of a row in another lane. No lane's state holds the target's logit.
  static __device__ __forceinline__ Row from_lane(const Row& row, int lanes) {
    const auto other = [lanes](auto value) { return __shfl_xor_sync(~0u, value, lanes); };
    Row from;
    from.max = other(row.max);
    from.sum = other(row.sum);
    if constexpr (kAll) {
      from.weighted_sum = other(row.weighted_sum);
      from.zbar = other(row.zbar);
      from.weight_seen = other(row.weight_seen);
      from.argmax = other(static_cast<int>(row.argmax));
    }
    return from;
  }

  // The one number that finds no room in shared memory beside the others.
  float weight_seen_[kAll ? kRowsOfThread : 1];
  const Params& p_;
  Facts& facts_;
  const TileWalk& walk_;
  float* own_;
  const int cluster_, slot_;
  int block_ = -1;
  int run_ = 0, first_row_ = 0, rows_ = 0;
};

}  // namespace cutloss::cuda::fused::sm90
