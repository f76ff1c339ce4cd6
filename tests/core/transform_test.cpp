// The transform from a product to a logit and its derivative, in fp32 and fp64: the derivative
// keeps its digits where tanh is 1 to the last of its own.
#include "core/transform.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace cutloss::test {
namespace {

constexpr double kSoftcap = 3, kInvTemperature = 0.8;

template <class T>
double slope_in(double x) {
  return static_cast<double>(transform_slope(static_cast<T>(x * kSoftcap), static_cast<T>(kSoftcap),
                                             static_cast<T>(kInvTemperature)));
}

TEST(Transform, SlopeIsTheDerivative) {
  const double step = 1e-6;
  for (const double a : {-9.0, -2.0, 0.0, 0.5, 4.0}) {
    const auto z = [](double at) { return transformed(at, kSoftcap, kInvTemperature); };
    EXPECT_NEAR(transform_slope(a, kSoftcap, kInvTemperature),
                (z(a + step) - z(a - step)) / (2 * step), 1e-9);
  }
}

TEST(Transform, SlopeKeepsItsDigitsWhereTanhIsSaturated) {
  for (const double x : {0.0, 1e-3, 0.5, 3.0, 4.5, 6.0, 9.0, 10.0, 20.0, 40.0}) {
    const long double cosh = std::cosh(static_cast<long double>(x));
    const auto want = static_cast<double>(static_cast<long double>(kInvTemperature) / cosh / cosh);
    for (const double sign : {-1.0, 1.0}) {
      // x itself is rounded, and e^(-2x) multiplies its error by 2x.
      const double digits = 8 + 8 * x;
      EXPECT_NEAR(slope_in<float>(sign * x), want, digits * 0x1p-24 * want) << x;
      EXPECT_NEAR(slope_in<double>(sign * x), want, digits * 0x1p-53 * want) << x;
    }
  }
}

TEST(Transform, WithoutASoftcapTemperatureIsAll) {
  EXPECT_EQ(transform_slope(123.0, 0.0, kInvTemperature), kInvTemperature);
  EXPECT_EQ(transformed(123.0, 0.0, kInvTemperature), 123.0 * kInvTemperature);
}

TEST(Transform, InfinitiesAreCappedAndNaNsStay) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(transformed(-kInf, 2.f, 1.f), -2.f);
  EXPECT_EQ(transform_slope(-kInf, 2.f, 1.f), 0.f);
  EXPECT_EQ(transform_slope(kInf, 2.f, 1.f), 0.f);
  EXPECT_TRUE(std::isnan(transformed(std::nanf(""), 2.f, 1.f)));
  EXPECT_TRUE(std::isnan(transform_slope(std::nanf(""), 2.f, 1.f)));
}

}  // namespace
}  // namespace cutloss::test
