// The transform from a product's sums to logits, and back to its slope, as the epilogues apply it.
#pragma once

#include "cuda/sm90/product.cuh"
#include "cuda/sm90/sm90.h"

namespace cutloss::sm90 {

inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ float exp_approx(float x) { return ptx::exp2_approx(x * kLog2e); }

// tanh through e^(-2|x|); the absolute error is about 2^-22.
__device__ __forceinline__ float tanh_approx(float x) {
  const float e = ptx::exp2_approx(-2 * kLog2e * fabsf(x));
  return copysignf(__fdividef(1.f - e, 1.f + e), x);
}

// d(z)/d(sum) without the scale, from z.
__device__ __forceinline__ float slope_of(float z, float inv_cap_temperature,
                                          float inv_temperature) {
  const float t = z * inv_cap_temperature;
  return (1.f - t * t) * inv_temperature;
}

// A row's sums to logits, in place. Columns beyond the vocabulary become -inf.
template <class Row>
__device__ __forceinline__ void to_logits(Row z, const LogitTransform& f, float inv_temperature,
                                          int first_column, int columns) {
  const Lane at;
  const float factor = f.scale * inv_temperature;
  CUTE_UNROLL
  for (int i = 0; i < kRowSums; ++i) z[i] *= factor;
  if (f.bias != nullptr) {
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; ++i) {
      const int column = first_column + at.column(i);
      if (column < columns) z[i] = fmaf(__ldg(f.bias + column), inv_temperature, z[i]);
    }
  }
  if (f.softcap != 0.f) {
    const float cap = f.softcap * inv_temperature, inverse = 1.f / cap;
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; ++i) z[i] = tanh_approx(z[i] * inverse) * cap;
  }
  if (first_column + kTileColumns > columns) {
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; ++i) {
      if (first_column + at.column(i) >= columns) z[i] = -kInfinity;
    }
  }
}

// Calls found(z) where the thread holds the target's logit, which then becomes `replacement`.
// target: the column in the tile, or anything outside of it.
template <class Row, class Found>
__device__ __forceinline__ void take_target(Row z, int target, float replacement, Found found) {
  if (!__any_sync(~0u, static_cast<unsigned>(target) < kTileColumns)) return;
  const Lane at;
  CUTE_UNROLL
  for (int i = 0; i < kRowSums; ++i) {
    if (at.column(i) == target) {
      found(z[i]);
      z[i] = replacement;
    }
  }
}

}  // namespace cutloss::sm90
