// Backward by vocabulary: the logits of a slab are made again and leave as g, rounded once.
#pragma once

#include "cuda/sm90/sm90.h"
#include "cuda/sm90/transform.cuh"

namespace cutloss::sm90 {

template <class Element>
class GradientEpilogue {
 public:
  static constexpr int kWarpBytes = kStripBytes;

  struct Params {
    LogitTransform transform;
    const int* target;
    int origin;  // as in StatisticsEpilogue
    const RowGradient* row;
    const float* class_weight;  // (columns), or null
    bool per_element;  // softcap, entropy or zbar: g is more than a multiple of p
  };

  __device__ GradientEpilogue(const Params& params, const CUtensorMap* out, char* buffer,
                              const TileWalk&, int, int)
      : p_(params), out_(out), buffer_(buffer) {}

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition, int first_row, int first_column,
                                       int rows, int columns) {
    const Lane at;
    CUTE_UNROLL
    for (int m = 0; m < kTileRows / 64; ++m) {
      CUTE_UNROLL
      for (int i = 2 * m; i < 2 * m + 2; ++i) {
        const int row = first_row + at.row(i);
        const bool valid = row < rows;
        const float inv_temperature = valid ? __ldg(p_.transform.inv_temperature + row) : 1.f;
        const auto z = row_of(sums, i);
        to_logits(z, p_.transform, inv_temperature, first_column, columns);
        const int target = valid ? __ldg(p_.target + row) - p_.origin - first_column : -1;
        const float4 own = valid ? __ldg(&p_.row[row].first) : float4{};
        if (p_.per_element) {
          const float4 more = valid ? __ldg(&p_.row[row].second) : float4{};
          to_g(z, own, more, target, inv_temperature, first_column, columns);
        } else {
          const float a = own.z * inv_temperature;
          CUTE_UNROLL
          for (int k = 0; k < kRowSums; ++k) z[k] = exp_approx((z[k] - own.x) - own.y) * a;
          take_target(z, target, own.w * inv_temperature, [](float) {});
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

  __device__ void finish() {}

 private:
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<Element, cute::half_t>) {
      return ptx::pack_f16(low, high);
    } else {
      return ptx::pack_bf16(low, high);
    }
  }

  // Logits to g = [p (a - d_entropy (t + H)) + zbar weight] slope, t = log p, in place.
  // own: row_max, log_sum, a, g_target; more: d_entropy, entropy, zbar.
  template <class Z>
  __device__ __forceinline__ void to_g(Z z, const float4& own, const float4& more, int target,
                                       float inv_temperature, int first_column,
                                       int columns) const {
    const Lane at;
    const float softcap = p_.transform.softcap;
    const float inverse = softcap == 0.f ? 0.f : 1.f / (softcap * inv_temperature);
    CUTE_UNROLL
    for (int k = 0; k < kRowSums; ++k) {
      const int column = first_column + at.column(k);
      float weight = 1.f;
      if (p_.class_weight != nullptr && column < columns) weight = __ldg(p_.class_weight + column);
      const float t = (z[k] - own.x) - own.y;
      const float p = exp_approx(t);
      float g = p * own.z;
      if (more.x != 0.f && p != 0.f) g -= more.x * p * (t + more.y);
      if (more.z != 0.f) g = fmaf(more.z, weight, g);
      if (at.column(k) == target) g = own.w;
      z[k] = g * (column < columns ? slope_of(z[k], inverse, inv_temperature) : 0.f);
    }
  }

  const Params& p_;
  const CUtensorMap* out_;
  char* buffer_;
};

}  // namespace cutloss::sm90
