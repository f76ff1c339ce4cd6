// The transform from a product's sums to logits, and back to its slope, as the epilogues apply it.
#pragma once

#include "cuda/fused/kernels.h"
#include "cuda/fused/sm90/product.cuh"

namespace cutloss::cuda::fused::sm90 {

inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ float exp_approx(float x) { return ptx::exp2_approx(x * kLog2e); }

// How far tanh x stays from 1 or -1, whichever is nearer, with the sign of x: 1 - |tanh x| =
// 2 u / (1 + u), u = e^(-2|x|). One number from which tanh and its slope both follow in two
// instructions: tanh to an absolute 2^-22, and the slope to a relative one, also where tanh itself
// would be 1 and have forgotten it (docs/math.md, section 1).
__device__ __forceinline__ float gap_to_cap(float x) {
  const float u = ptx::exp2_approx(-2 * kLog2e * fabsf(x));
  return copysignf(2.f * u * ptx::reciprocal_approx(1.f + u), x);
}
// A gap of +inf, which none is, gives -inf: a column that is not there.
inline constexpr float kNoGap = kInfinity;
__device__ __forceinline__ float tanh_of_gap(float gap) { return copysignf(1.f, gap) - gap; }
// 1 - tanh^2 = (1 - |tanh|) (1 + |tanh|)
__device__ __forceinline__ float slope_of_gap(float gap) { return fabsf(gap) * (2.f - fabsf(gap)); }

// What the epilogue of a tile needs of its columns and rows, in shared memory. It is read while the
// other group multiplies, since in the epilogue nothing would hide the way to device memory.
struct TileFacts {
  float bias[kTileColumns];
  float weight[kTileColumns];  // 0 beyond the vocabulary
  float inv_temperature[kTileRows];
  int target[kTileRows];  // the column in the tile, or any number outside of it
};

// The 128 threads of a group read the facts together. `origin` is the product's first column.
__device__ __forceinline__ void read_facts(TileFacts& facts, const LogitTransform& transform,
                                           const float* class_weight, const int* target, int origin,
                                           int first_row, int first_column, int rows,
                                           int last_column) {
  const int thread = threadIdx.x % 128;
  for (int i = thread; i < kTileColumns; i += 128) {
    const int column = first_column + i;
    const bool valid = column < last_column;
    facts.bias[i] = valid && transform.bias != nullptr ? __ldg(transform.bias + column) : 0.f;
    facts.weight[i] = !valid ? 0.f : class_weight == nullptr ? 1.f : __ldg(class_weight + column);
  }
  const int row = first_row + thread;
  const bool valid = row < rows;
  facts.inv_temperature[thread] = valid ? __ldg(transform.inv_temperature + row) : 1.f;
  const int column = valid ? __ldg(target + row) - origin : -1;
  facts.target[thread] = column < last_column ? column - first_column : -1;
}

// Multiplies a row's sums with a factor and adds the bias's share, in place.
template <class Row>
__device__ __forceinline__ void scale_and_shift(Row z, const LogitTransform& f,
                                                const TileFacts& facts, float after) {
  const Lane at;
  const float factor = f.scale * after;
  CUTE_UNROLL
  for (int i = 0; i < kRowSums; ++i) z[i] *= factor;
  if (f.bias == nullptr) return;
  CUTE_UNROLL
  for (int i = 0; i < kRowSums; i += 2) {
    const float2 bias = *reinterpret_cast<const float2*>(facts.bias + at.column(i));
    z[i] = fmaf(bias.x, after, z[i]);
    z[i + 1] = fmaf(bias.y, after, z[i + 1]);
  }
}

// Columns beyond the tile's last one become `nothing`.
template <class Row>
__device__ __forceinline__ void cut_off(Row z, int first_column, int last_column,
                                        float nothing = -kInfinity) {
  if (first_column + kTileColumns <= last_column) return;
  const Lane at;
  CUTE_UNROLL
  for (int i = 0; i < kRowSums; ++i) {
    if (first_column + at.column(i) >= last_column) z[i] = nothing;
  }
}

// Makes logits of a row's sums, in place, and -inf beyond the tile's last column.
template <class Row>
__device__ __forceinline__ void to_logits(Row z, const LogitTransform& f, const TileFacts& facts,
                                          float inv_temperature, int first_column,
                                          int last_column) {
  if (f.softcap == 0.f) {
    scale_and_shift(z, f, facts, inv_temperature);
  } else {
    scale_and_shift(z, f, facts, f.inv_softcap);
    const float cap = f.softcap * inv_temperature;
    CUTE_UNROLL
    for (int i = 0; i < kRowSums; ++i) z[i] = tanh_of_gap(gap_to_cap(z[i])) * cap;
  }
  cut_off(z, first_column, last_column);
}

// Makes gaps of a row's sums where there is a softcap. The logit (tanh_of_gap times softcap *
// inv_temperature) and its slope are simple functions of a gap.
template <class Row>
__device__ __forceinline__ void to_gaps(Row z, const LogitTransform& f, const TileFacts& facts) {
  scale_and_shift(z, f, facts, f.inv_softcap);
  CUTE_UNROLL
  for (int i = 0; i < kRowSums; ++i) z[i] = gap_to_cap(z[i]);
}

// Calls found(z) where the thread holds the target's logit, which then becomes `replacement`.
// `target` is the column in the tile, or any number outside of it.
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

}  // namespace cutloss::cuda::fused::sm90
