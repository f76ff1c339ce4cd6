// Forward: each thread carries the running statistics of its four rows through all tiles of a row
// block, so that no logit leaves the registers. Where a cluster turns to another row block, each
// of its two groups of threads leaves one set of partial statistics per row.
#pragma once

#include "cuda/sm90/sm90.h"
#include "cuda/sm90/transform.cuh"

namespace cutloss::sm90 {

// kAll: entropy, zbar and argmax too.
template <bool kAll>
class StatisticsEpilogue {
  static constexpr int kNumbers = kAll ? 5 : 2;  // of a row

 public:
  // The statistics wait in shared memory, each thread's in a column of its own: the registers are
  // full of sums while a tile is multiplied.
  static constexpr int kWarpBytes = kRowsOfThread * kNumbers * 32 * 4;

  using Facts = TileFacts;

  struct Params {
    LogitTransform transform;
    const int* target;    // (rows): a column of the vocabulary, or -1
    int origin;           // the column of the vocabulary that is this product's first
    float* target_logit;  // (rows): written where the target is among the columns
    Partials partials;
    const float* class_weight;  // (columns), or null: all ones
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
      if constexpr (kAll) add_zbar(z, state);
      take_target(z, facts_.target[at.row(i)], -kInfinity,
                  [&](float logit) { p_.target_logit[first_row + at.row(i)] = logit; });
      add(z, state, first_column);
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
      for (int lanes = 1; lanes < 4; lanes *= 2) join(state, lanes);
      const int row = first_row_ + at.row(i);
      if (at.lane % 4 != 0 || row >= rows_) continue;
      const std::int64_t to = p_.partials.index(walk_, run_, slot, row);
      p_.partials.max_and_sum[to] = make_float2(state.max, state.sum);
      if constexpr (kAll) {
        p_.partials.weighted_and_zbar[to] = make_float2(state.weighted, state.zbar);
        p_.partials.argmax[to] = state.argmax;
      }
    }
  }

 private:
  struct Row {
    float max = -kInfinity;
    float sum = 0;
    float weighted = 0, zbar = 0;  // these with kAll only
    int argmax = -1;
  };

  __device__ __forceinline__ Row get(int i) const {
    const float* from = own_ + i * kNumbers * 32;
    Row row;
    row.max = from[0];
    row.sum = from[32];
    if constexpr (kAll) {
      row.weighted = from[64];
      row.zbar = from[96];
      row.argmax = __float_as_int(from[128]);
    }
    return row;
  }

  __device__ __forceinline__ void put(int i, const Row& row) {
    float* to = own_ + i * kNumbers * 32;
    to[0] = row.max;
    to[32] = row.sum;
    if constexpr (kAll) {
      to[64] = row.weighted;
      to[96] = row.zbar;
      to[128] = __int_as_float(row.argmax);
    }
  }

  template <class Z>
  __device__ __forceinline__ void add_zbar(Z z, Row& row) {
    const Lane at;
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; i += 2) {
      // A weight of 0 leaves an infinite logit out.
      const float2 weight = *reinterpret_cast<const float2*>(facts_.weight + at.column(i));
      if (weight.x != 0.f) row.zbar = fmaf(weight.x, z[i], row.zbar);
      if (weight.y != 0.f) row.zbar = fmaf(weight.y, z[i + 1], row.zbar);
    }
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
      row.weighted = old_scale * fmaf(moved, row.sum, row.weighted);
    }
    float sum[2] = {row.sum * old_scale, 0.f};
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; ++i) {
      const float t = z[i] - shift;
      const float e = exp_approx(t);
      sum[i % 2] += e;
      if constexpr (kAll) row.weighted = fmaf(e, fmaxf(t, -1e4f), row.weighted);  // 0 * -inf is 0
    }
    row.sum = sum[0] + sum[1];
    row.max = top;
  }

  __device__ __forceinline__ void join(Row& row, int lanes) {
    const auto other = [lanes](float value) { return __shfl_xor_sync(~0u, value, lanes); };
    const float other_max = other(row.max), other_sum = other(row.sum);
    const float top = fmaxf(row.max, other_max);
    const float shift = top == -kInfinity ? 0.f : top;
    const float own_scale = exp_approx(row.max - shift);
    const float other_scale = exp_approx(other_max - shift);
    if constexpr (kAll) {
      const float other_weighted = other(row.weighted);
      const float own_moved = row.max == -kInfinity ? 0.f : row.max - shift;
      const float other_moved = other_max == -kInfinity ? 0.f : other_max - shift;
      row.weighted = own_scale * fmaf(own_moved, row.sum, row.weighted) +
                     other_scale * fmaf(other_moved, other_sum, other_weighted);
      row.zbar += other(row.zbar);
      const int other_argmax = __shfl_xor_sync(~0u, row.argmax, lanes);
      const bool other_first = static_cast<unsigned>(other_argmax) <
                               static_cast<unsigned>(row.argmax);  // -1 is the last of all
      if (other_max > row.max || (other_max == row.max && other_first)) row.argmax = other_argmax;
    }
    row.sum = row.sum * own_scale + other_sum * other_scale;
    row.max = top;
  }

  const Params& p_;
  Facts& facts_;
  const TileWalk& walk_;
  float* own_;
  const int cluster_, slot_;
  int block_ = -1;
  int run_ = 0, first_row_ = 0, rows_ = 0;
};

}  // namespace cutloss::sm90
