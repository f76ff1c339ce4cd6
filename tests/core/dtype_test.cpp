// The library's conversions against the reference's, which share no code.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "reference/number.h"

namespace cutloss::test {
namespace {

std::uint16_t reference_bits(DType type, double value) {
  std::uint16_t bits = 0;
  reference::store(&bits, type, 0, value);
  return bits;
}

// Around every 16-bit number of a format: itself, the midpoint to the next, and one fp32 unit to
// either side of both.
template <class Widen>
std::vector<float> delicate_values(Widen widen) {
  std::vector<float> values;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = widen(static_cast<std::uint16_t>(bits));
    if (!std::isfinite(value)) continue;
    const float next = widen(static_cast<std::uint16_t>(bits + 1));
    const float middle = std::isfinite(next) ? value / 2 + next / 2 : value;
    for (const float x : {value, middle}) {
      values.push_back(x);
      values.push_back(std::nextafter(x, HUGE_VALF));
      values.push_back(std::nextafter(x, -HUGE_VALF));
    }
  }
  return values;
}

TEST(DType, EveryBf16WidensToItsValue) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double want = reference::load(&half, DType::bf16, 0);
    const float got = bf16_to_float(half);
    EXPECT_TRUE(got == want || (std::isnan(got) && std::isnan(want))) << bits;
  }
}

TEST(DType, EveryF16WidensToItsValue) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double want = reference::load(&half, DType::f16, 0);
    const float got = f16_to_float(half);
    EXPECT_TRUE(got == want || (std::isnan(got) && std::isnan(want))) << bits;
    EXPECT_EQ(std::signbit(got), (bits & 0x8000) != 0) << bits;
  }
}

TEST(DType, RoundsToTheNearestBf16) {
  for (const float value : delicate_values(bf16_to_float)) {
    EXPECT_EQ(float_to_bf16(value), reference_bits(DType::bf16, value)) << value;
  }
}

TEST(DType, RoundsToTheNearestF16) {
  for (const float value : delicate_values(f16_to_float)) {
    EXPECT_EQ(float_to_f16(value), reference_bits(DType::f16, value)) << value;
  }
}

TEST(DType, RoundsRandomBitsToTheNearest) {
  std::mt19937 random(7);
  for (int i = 0; i < 1000000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(value)) continue;
    ASSERT_EQ(float_to_bf16(value), reference_bits(DType::bf16, value)) << value;
    ASSERT_EQ(float_to_f16(value), reference_bits(DType::f16, value)) << value;
  }
}

TEST(DType, KeepsInfinitiesAndNaNs) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float value : {inf, -inf}) {
    EXPECT_EQ(bf16_to_float(float_to_bf16(value)), value);
    EXPECT_EQ(f16_to_float(float_to_f16(value)), value);
  }
  // NaNs whose payload lies only in the bits that are cut off must not become infinities.
  for (const std::uint32_t bits : {0x7fc00000u, 0x7f800001u, 0xff800001u, 0x7fffffffu}) {
    EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(bits))))) << bits;
    EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(std::bit_cast<float>(bits))))) << bits;
  }
  EXPECT_EQ(f16_to_float(float_to_f16(65519.0f)), 65504.0f);
  EXPECT_EQ(f16_to_float(float_to_f16(65520.0f)), inf);
}

TEST(DType, SizesAndStatisticsDtype) {
  for (const DType type : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    EXPECT_EQ(size_of(type), reference::bytes_of(type)) << name(type);
    EXPECT_EQ(stat_type(type), type == DType::f64 ? DType::f64 : DType::f32) << name(type);
  }
}

}  // namespace
}  // namespace cutloss::test
