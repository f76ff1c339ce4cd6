// Sizes of dtypes, and conversions of single values. The engines have those of whole vectors.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cutloss/problem.h"

namespace cutloss {

constexpr std::int64_t size_of(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

// The address `elements` past a base.
inline const void* at(const void* base, DType type, std::int64_t elements) {
  return static_cast<const std::byte*>(base) + elements * size_of(type);
}
inline void* at(void* base, DType type, std::int64_t elements) {
  return static_cast<std::byte*>(base) + elements * size_of(type);
}

// The dtype of per-row statistics and of accumulators.
constexpr DType stat_type(DType compute_type) {
  return compute_type == DType::f64 ? DType::f64 : DType::f32;
}

// The stat dtype of a problem. Logits have no products, so the dtype that they are stored in
// decides.
inline DType stat_type(const Problem& problem) {
  const auto* logits = std::get_if<Logits>(&problem.source);
  return stat_type(logits != nullptr ? logits->type : problem.compute_type);
}

// Calls use(pointer to float or double), whichever a stat dtype is.
template <class Use>
void for_stat(DType stat, Use use) {
  stat == DType::f64 ? use(static_cast<double*>(nullptr)) : use(static_cast<float*>(nullptr));
}

inline float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // inf, NaN
    return std::bit_cast<float>(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  }
  if (magnitude < 0x400) {  // zero, subnormal: magnitude * 2^-24 is exact in fp32
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

// Rounds to nearest even; what is too large becomes inf.
inline std::uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // >= 65520
  if (magnitude < 0x38800000) {  // below 2^-14: a subnormal, in units of 2^-24
    const float units = std::bit_cast<float>(magnitude) * 0x1p24f;
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(units)));
  }
  const std::uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

}  // namespace cutloss
