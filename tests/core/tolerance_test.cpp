// The bounds that all comparisons rest on: what is right passes, what is a little wrong fails.
#include "tolerance.h"

#include <gtest/gtest.h>

#include <cmath>

namespace cutloss::test {
namespace {

struct Compared {
  Data data;
  reference::Result want;
  Bounds bound;
};

Compared compared(const Types& types, LogitKind logits = LogitKind::random) {
  Case c = with_size(1, 200, 500, 16);
  set_types(c.problem, types);
  c.logits = logits;
  Compared all{make_data(c), {}, {}};
  all.want = reference::evaluate(all.data.problem, all.data.inputs(), all.data.upstream64());
  all.bound = bounds(all.data, all.want);
  return all;
}

// `value` with a relative error in every element, as it would be stored.
std::vector<double> off_by(std::vector<double> values, double error, DType type) {
  for (double& value : values) value = reference::rounded(value * (1 + error), type);
  return values;
}

TEST(Tolerance, AcceptsTheReferenceRoundedToTheOutputsDtype) {
  for (const Types& types : kTypes) {
    SCOPED_TRACE(types.name);
    const auto [data, want, bound] = compared(types);
    EXPECT_EQ(outside("nll", off_by(want.nll, 0, reference::stat_type(data.problem)), want.nll,
                      bound.nll),
              "");
    EXPECT_EQ(outside("de", off_by(want.de, 0, types.e), want.de, bound.de), "");
    EXPECT_EQ(outside("dc", off_by(want.dc, 0, types.c), want.dc, bound.dc), "");
  }
}

// Wrong by a part in 2000 where fp32 is promised; by 1 in 8 where bf16 has a part in it.
TEST(Tolerance, RefusesSmallErrors) {
  for (const Types& types : kTypes) {
    SCOPED_TRACE(types.name);
    const auto [data, want, bound] = compared(types);
    EXPECT_NE(outside("nll", off_by(want.nll, 5e-4, DType::f64), want.nll, bound.nll), "");
    EXPECT_NE(outside("lse", off_by(want.lse, 5e-4, DType::f64), want.lse, bound.lse), "");
    const bool coarse = types.compute == DType::bf16 || types.e == DType::bf16;
    for (const auto& [values, allowed] :
         {std::pair(&want.de, &bound.de), std::pair(&want.dc, &bound.dc)}) {
      EXPECT_NE(outside("gradient", off_by(*values, coarse ? 0.125 : 4e-3, DType::f64), *values,
                        *allowed),
                "");
    }
  }
}

// The second rule sees what the first one cannot: a rounding of dC at every row.
TEST(Tolerance, TheMeanErrorRefusesAccumulationInSixteenBits) {
  const auto [data, want, bound] = compared(kTypes[1]);
  // dC summed row by row in bf16.
  std::vector<double> in_bf16(want.dc.size(), 0);
  for (std::int64_t n = 0; n < want.N; ++n) {
    if (want.target[n] < 0) continue;
    for (std::int64_t v = 0; v < want.V; ++v) {
      for (std::int64_t d = 0; d < want.D; ++d) {
        double& sum = in_bf16[v * want.D + d];
        sum =
            reference::rounded(sum + want.g[n * want.V + v] * want.e[n * want.D + d], DType::bf16);
      }
    }
  }
  EXPECT_GT(root_mean_square_error(in_bf16, want.dc), kRmsSlack * bound.dc_rms);
  // One rounding of g and of the output is what it allows.
  std::vector<double> once(want.dc.size(), 0);
  for (std::int64_t n = 0; n < want.N; ++n) {
    if (want.target[n] < 0) continue;
    for (std::int64_t v = 0; v < want.V; ++v) {
      const double g = reference::rounded(want.g[n * want.V + v], DType::bf16);
      for (std::int64_t d = 0; d < want.D; ++d) once[v * want.D + d] += g * want.e[n * want.D + d];
    }
  }
  EXPECT_LT(root_mean_square_error(off_by(once, 0, DType::bf16), want.dc), bound.dc_rms);
}

// nll = lse - z_target in fp32 loses the digits of confident rows, and is refused there.
TEST(Tolerance, RefusesASubtractionOnConfidentRows) {
  const auto [data, want, bound] = compared(kTypes[0], LogitKind::peaked);
  std::vector<double> subtracted(want.nll.size(), 0);
  for (std::int64_t n = 0; n < want.N; ++n) {
    if (want.target[n] < 0) continue;
    const auto lse = static_cast<float>(want.lse[n]);
    const auto target = static_cast<float>(want.z[n * want.V + want.target[n]]);
    subtracted[n] = lse - target;
  }
  EXPECT_NE(outside("nll", subtracted, want.nll, bound.nll), "");
}

TEST(Tolerance, WantsNaNsAndInfinitiesInTheirPlaces) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  const std::vector<double> bound = {1, 1};
  EXPECT_EQ(outside("x", {nan, inf}, {nan, inf}, bound), "");
  EXPECT_NE(outside("x", {0, inf}, {nan, inf}, bound), "");
  EXPECT_NE(outside("x", {nan, inf}, {0, inf}, bound), "");
  EXPECT_NE(outside("x", {nan, -inf}, {nan, inf}, bound), "");
  EXPECT_NE(outside("x", {nan, 1e30}, {nan, inf}, bound), "");
  EXPECT_NE(outside("x", {1}, {1, 2}, bound), "");
}

}  // namespace
}  // namespace cutloss::test
