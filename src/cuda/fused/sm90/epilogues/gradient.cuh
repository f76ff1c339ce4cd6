// The epilogue of backward by vocabulary: the logits of a slab, made again, are stored as g,
// rounded once.
#pragma once

#include <type_traits>

#include "cuda/fused/sm90/epilogues/storing.cuh"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/transform.cuh"

namespace cutloss::cuda::fused::sm90 {

struct GradientFacts : TileFacts {
  float4 row[kTileRows];  // row_max, log_sum, a, target_g
};

struct GradientParams {
  LogitTransform transform;
  const int* target;
  int origin;  // as in StatisticsEpilogue
  const cuda::RowGradient<float>* row;
  const float* class_weight;  // (columns), or null
};

template <class Element, GradientKind kKind>
class GradientEpilogue : public StoringEpilogue<GradientParams, GradientFacts> {
 public:
  using StoringEpilogue::StoringEpilogue;

  __device__ __forceinline__ void prepare(int first_row, int first_column, int rows,
                                          int last_column) {
    read_facts(facts_, p_.transform, p_.class_weight, p_.target, p_.origin, first_row, first_column,
               rows, last_column);
    const int thread = threadIdx.x % 128;
    facts_.row[thread] = first_row + thread < rows ? first_half(first_row + thread) : float4{};
  }

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition, int first_row, int first_column,
                                       int rows, int last_column) {
    const Lane at;
    CUTE_UNROLL
    for (int m = 0; m < kTileRows / 64; ++m) {
      CUTE_UNROLL
      for (int i = 2 * m; i < 2 * m + 2; ++i) {
        const int row = first_row + at.row(i);
        const bool valid = row < rows;
        const float inv_temperature = facts_.inv_temperature[at.row(i)];
        const auto z = row_of(sums, i);
        const int target = facts_.target[at.row(i)];
        const float4 own = facts_.row[at.row(i)];
        // Columns beyond the vocabulary hold anything: they are not stored.
        if constexpr (kKind == GradientKind::plain) {
          scale_and_shift(z, p_.transform, facts_, inv_temperature);
          const float a = own.z * inv_temperature;
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) z[k] = exp_approx((z[k] - own.x) - own.y) * a;
          take_target(z, target, own.w * inv_temperature, [](float) {});
        } else if constexpr (kKind == GradientKind::capped) {
          to_gaps(z, p_.transform, facts_);
          const float cap = p_.transform.softcap * inv_temperature;
          const float a = own.z * inv_temperature;
          float at_target = 0.f;
          take_target(z, target, 0.f,
                      [&](float gap) { at_target = own.w * inv_temperature * slope_of_gap(gap); });
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) {
            const float p = exp_approx(fmaf(tanh_of_gap(z[k]), cap, -own.x) - own.y);
            z[k] = p * a * slope_of_gap(z[k]);
          }
          take_target(z, target, at_target, [](float) {});
        } else {
          if constexpr (kGaps) {
            to_gaps(z, p_.transform, facts_);
          } else {
            scale_and_shift(z, p_.transform, facts_, inv_temperature);
          }
          to_g(z, own, valid ? second_half(row) : float4{}, target, inv_temperature);
        }
        // Rows beyond the list are zero whatever C holds.
        if (!valid) {
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) z[k] = 0.f;
        }
      }
      CUTE_UNROLL
      for (int h = 0; h < kTileColumns / 64; ++h) {
        store_strip(sums, m, h, out_, buffer_, first_row + m * 64 + at.warp * 16,
                    first_column + h * 64, [](float low, float high) { return pack(low, high); });
      }
    }
  }

 private:
  static constexpr bool kGaps = kKind == GradientKind::general_capped;

  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<Element, cute::half_t>) {
      return ptx::pack_f16(low, high);
    } else {
      return ptx::pack_bf16(low, high);
    }
  }

  __device__ float4 first_half(int row) const {
    return __ldg(reinterpret_cast<const float4*>(p_.row + row));
  }
  __device__ float4 second_half(int row) const {
    return __ldg(reinterpret_cast<const float4*>(p_.row + row) + 1);
  }

  // Makes g = [p (a - d_entropy (t + H)) + zbar weight] slope of logits, or gaps, in place; t = log
  // p. `own` is row_max, log_sum, a, target_g, and `more` is d_entropy, entropy, zbar.
  template <class Z>
  __device__ __forceinline__ void to_g(Z z, const float4& own, const float4& more, int target,
                                       float inv_temperature) const {
    const Lane at;
    // Where p is 0, t may be infinite.
    const auto by_p = [&](float logit) {
      const float t = (logit - own.x) - own.y;
      const float p = exp_approx(t);
      return p * fmaf(-more.x, p == 0.f ? 0.f : t + more.y, own.z);
    };
    float at_target = own.w * inv_temperature;
    if constexpr (kGaps) {
      const float cap = p_.transform.softcap * inv_temperature;
      take_target(z, target, 0.f, [&](float gap) { at_target *= slope_of_gap(gap); });
      const auto by_gap = [&](float gap, float g) {
        return g * slope_of_gap(gap) * inv_temperature;
      };
      // There are two loops because ptxas spills 1.3 KB with one for both.
      if (more.z == 0.f) {
        CUTE_UNROLL
        for (int k = 0; k < kRowSums; ++k) z[k] = by_gap(z[k], by_p(tanh_of_gap(z[k]) * cap));
      } else {
        CUTE_UNROLL
        for (int k = 0; k < kRowSums; ++k) {
          const float p_term = by_p(tanh_of_gap(z[k]) * cap);
          z[k] = by_gap(z[k], fmaf(more.z, facts_.weight[at.column(k)], p_term));
        }
      }
    } else {
      CUTE_UNROLL
      for (int k = 0; k < kRowSums; ++k) z[k] = by_p(z[k]);
      // This loop is by itself because beside the exponentials the weights would not find
      // registers.
      if (more.z != 0.f) {
        CUTE_UNROLL
        for (int k = 0; k < kRowSums; ++k) {
          z[k] = fmaf(more.z, facts_.weight[at.column(k)], z[k]);
        }
      }
      CUTE_UNROLL
      for (int k = 0; k < kRowSums; ++k) z[k] *= inv_temperature;
    }
    take_target(z, target, at_target, [](float) {});
  }
};

}  // namespace cutloss::cuda::fused::sm90
