// The epilogue by rows: the logits of a chunk are stored as x = e^(z - reference), one reference
// for each row, times the softcap's slope; their sums stay in fp32. The target is left out of both
// (x is 0 there): its part of the gradients is added exactly, elsewhere. docs/math.md, "Reference
// exponents".
#pragma once

#include "cuda/fused/kernels.h"
#include "cuda/fused/sm90/epilogues/storing.cuh"
#include "cuda/fused/sm90/transform.cuh"

namespace cutloss::cuda::fused::sm90 {

struct ExponentialsFacts : TileFacts {
  float reference[kTileRows];
};

struct ExponentialsParams {
  LogitTransform transform;
  const int* target;       // (rows)
  const float* reference;  // (rows)
  float2* sum_and_max;     // (rows, column tiles): the sum of e^(z - reference), the largest z
  int column_tiles;
};

template <bool kCapped>
class ExponentialsEpilogue : public StoringEpilogue<ExponentialsParams, ExponentialsFacts> {
 public:
  using StoringEpilogue::StoringEpilogue;

  __device__ __forceinline__ void prepare(int first_row, int first_column, int rows,
                                          int last_column) {
    read_facts(facts_, p_.transform, nullptr, p_.target, 0, first_row, first_column, rows,
               last_column);
    const int thread = threadIdx.x % 128;
    const int row = first_row + thread;
    facts_.reference[thread] = row < rows ? __ldg(p_.reference + row) : 0.f;
  }

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition position, int first_row,
                                       int first_column, int rows, int last_column) {
    const Lane at;
    CUTE_UNROLL
    for (int m = 0; m < kTileRows / 64; ++m) {
      CUTE_UNROLL
      for (int i = 2 * m; i < 2 * m + 2; ++i) {
        const int row = first_row + at.row(i);
        const bool valid = row < rows;
        const float inv_temperature = facts_.inv_temperature[at.row(i)];
        const auto z = row_of(sums, i);
        // z becomes x. With a softcap it holds gaps on the way, and the logits' unit is the cap.
        constexpr float kNothing = kCapped ? kNoGap : -kInfinity;
        const float unit = kCapped ? p_.transform.softcap * inv_temperature : 1.f;
        if constexpr (kCapped) {
          to_gaps(z, p_.transform, facts_);
        } else {
          scale_and_shift(z, p_.transform, facts_, inv_temperature);
        }
        cut_off(z, first_column, last_column, kNothing);
        take_target(z, facts_.target[at.row(i)], kNothing, [](float) {});
        const float reference = facts_.reference[at.row(i)];
        float top = kCapped ? -kInfinity : z[0];
        float sum = 0.f;
        if constexpr (kCapped) {
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) {
            const float t = tanh_of_gap(z[k]);
            top = fmaxf(top, t);
            const float e = exp_approx(fmaf(t, unit, -reference));
            sum += e;
            z[k] = e == 0.f ? 0.f : e * slope_of_gap(z[k]);
          }
        } else {
          CUTE_UNROLL
          for (int k = 1; k < kRowSums; ++k) top = fmaxf(top, z[k]);
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) {
            const float e = exp_approx(fmaf(z[k], unit, -reference));
            sum += e;
            z[k] = e;
          }
        }
        top *= unit;
        // Rows beyond the list are zero whatever C holds.
        if (!valid) {
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) z[k] = 0.f;
        }
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          sum += __shfl_xor_sync(~0u, sum, lanes);
          top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
        }
        if (at.lane % 4 == 0 && valid) {
          p_.sum_and_max[std::int64_t{row} * p_.column_tiles + position.column_tile] =
              make_float2(sum, top);
        }
      }
      CUTE_UNROLL
      for (int h = 0; h < kTileColumns / 64; ++h) {
        store_strip(sums, m, h, out_, buffer_, first_row + m * 64 + at.warp * 16,
                    first_column + h * 64,
                    [](float low, float high) { return ptx::pack_bf16(low, high); });
      }
    }
  }
};

}  // namespace cutloss::cuda::fused::sm90
