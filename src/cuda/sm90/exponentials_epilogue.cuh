// By rows: the logits of a chunk leave as x = e^(z - reference), one reference for each row, times
// the softcap's slope; their sums stay in fp32. The target is left out of both (x is 0 there): its
// part of the gradients is added exactly, elsewhere. docs/math.md, "Reference exponents".
#pragma once

#include "cuda/sm90/sm90.h"
#include "cuda/sm90/transform.cuh"

namespace cutloss::sm90 {

class ExponentialsEpilogue {
 public:
  static constexpr int kWarpBytes = kStripBytes;

  struct Params {
    LogitTransform transform;
    const int* target;       // (rows)
    const float* reference;  // (rows)
    float2* sum_and_max;     // (rows, column tiles): of e^(z - reference), of z
    int column_tiles;
  };

  __device__ ExponentialsEpilogue(const Params& params, const CUtensorMap* out, char* buffer,
                                  const TileWalk&, int, int)
      : p_(params), out_(out), buffer_(buffer) {}

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition position, int first_row,
                                       int first_column, int rows, int columns) {
    const Lane at;
    const float softcap = p_.transform.softcap;
    CUTE_UNROLL
    for (int m = 0; m < kTileRows / 64; ++m) {
      CUTE_UNROLL
      for (int i = 2 * m; i < 2 * m + 2; ++i) {
        const int row = first_row + at.row(i);
        const bool valid = row < rows;
        const float inv_temperature = valid ? __ldg(p_.transform.inv_temperature + row) : 1.f;
        const auto z = row_of(sums, i);
        to_logits(z, p_.transform, inv_temperature, first_column, columns);
        take_target(z, valid ? __ldg(p_.target + row) - first_column : -1, -kInfinity,
                    [](float) {});
        float top = z[0];
        CUTE_UNROLL
        for (int k = 1; k < kRowSums; ++k) top = fmaxf(top, z[k]);
        const float reference = valid ? __ldg(p_.reference + row) : 0.f;
        float sum = 0.f;
        if (softcap == 0.f) {
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) {
            z[k] = exp_approx(z[k] - reference);
            sum += z[k];
          }
        } else {
          const float inverse = 1.f / (softcap * inv_temperature);
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) {
            const float e = exp_approx(z[k] - reference);
            sum += e;
            z[k] = e == 0.f ? 0.f : e * slope_of(z[k], inverse, 1.f);
          }
        }
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

  __device__ void finish() {}

 private:
  const Params& p_;
  const CUtensorMap* out_;
  char* buffer_;
};

}  // namespace cutloss::sm90
