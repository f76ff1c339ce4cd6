// The one comparison behind all accuracy tests.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "engines.h"
#include "tolerance.h"

namespace cutloss::test {

struct Truth {
  reference::Result want;
  Bounds bound;
  bool errors_are_independent;  // rule 2 of tolerance.h applies

  Truth(const std::string& engine, const Case& c, const Data& data)
      : want(truth_for(engine, data)),
        bound(bounds(data, want)),
        errors_are_independent(want.compute_type == DType::bf16 && c.logits == LogitKind::random &&
                               want.de.size() >= 1000) {}
};

// The logit that was called the largest is the largest, but for rounding; ignored rows get -1.
inline std::string wrong_argmax(const std::vector<std::int64_t>& got, const reference::Result& want,
                                const Bounds& bound) {
  for (std::int64_t n = 0; n < want.N; ++n) {
    const std::int64_t v = got[n];
    if (want.target[n] < 0 && v == -1) continue;
    if (want.target[n] >= 0 && v >= 0 && v < want.V &&
        want.z[n * want.V + v] >= want.row_max[n] - 2 * bound.logit[n]) {
      continue;
    }
    return "argmax: row " + std::to_string(n) + " got " + std::to_string(v) + ", want " +
           std::to_string(want.argmax[n]);
  }
  return "";
}

// Compares everything that the problem asks for.
inline void expect_accurate(const Outputs& got, const Data& data, const Truth& truth) {
  const auto& [want, bound, errors_are_independent] = truth;
  const auto check = [&](const char* what, const Array& array, std::vector<double> expected,
                         const std::vector<double>& allowed) {
    // Beyond the largest number of the output's dtype lies infinity.
    for (double& value : expected) {
      const double stored = reference::rounded(value, array.type);
      if (std::isinf(stored)) value = stored;
    }
    EXPECT_EQ(outside(what, array.values(), expected, allowed), "");
  };
  check("nll", got.nll, want.nll, bound.nll);
  check("lse", got.lse, want.lse, bound.lse);
  std::vector<double> lse_in_parts = got.row_max.values();
  for (std::int64_t n = 0; n < want.N; ++n) lse_in_parts[n] += got.log_sum.get(n);
  EXPECT_EQ(outside("row_max + log_sum", lse_in_parts, want.lse, bound.lse), "");
  for (std::int64_t n = 0; n < want.N; ++n) EXPECT_GE(got.nll.get(n), 0) << "row " << n;

  const Problem& p = data.problem;
  if (p.wanted.entropy) check("entropy", got.entropy, want.entropy, bound.entropy);
  if (p.wanted.zbar) {
    check("zbar", got.zbar, want.zbar, bound.zbar);
    check("zbar_centred", got.zbar_centred, want.zbar_centred, bound.zbar_centred);
  }
  if (p.wanted.argmax) {
    EXPECT_EQ(wrong_argmax(got.argmax, want, bound), "");
  }
  if (p.wanted.de.wanted) check("de", got.de, want.de, bound.de);
  const auto check_added = [&](const char* what, const GradientWanted& gradient, const Array& array,
                               std::vector<double> expected, std::vector<double> allowed) {
    for (std::int64_t i = 0; gradient.add && i < array.count; ++i) {
      expected[i] += added_to(i);
      allowed[i] += 2 * reference::unit_roundoff(array.type) * std::fabs(expected[i]);
    }
    check(what, array, std::move(expected), allowed);
  };
  if (p.wanted.dc.wanted) check_added("dc", p.wanted.dc, got.dc, want.dc, bound.dc);
  if (p.wanted.dbias.wanted) {
    check_added("dbias", p.wanted.dbias, got.dbias, want.dbias, bound.dbias);
  }

  // Rule 2 needs many errors, independent of each other.
  if (!errors_are_independent) return;
  const auto check_rms = [](const char* what, const Array& array,
                            const std::vector<double>& expected, double allowed) {
    const double error = root_mean_square_error(array.values(), expected);
    EXPECT_LE(error, kRmsSlack * allowed) << what << " (root mean square)";
  };
  if (p.wanted.de.wanted) check_rms("de", got.de, want.de, bound.de_rms);
  if (p.wanted.dc.wanted && !p.wanted.dc.add) check_rms("dc", got.dc, want.dc, bound.dc_rms);
}

// Runs the plan, and compares what it made.
inline void expect_accurate(const Plan& plan, const Data& data, const Truth& truth) {
  bool intact = false;
  const Outputs got = run(plan, data, &intact);
  EXPECT_TRUE(intact) << "wrote outside the memory it was given";
  expect_accurate(got, data, truth);
}

}  // namespace cutloss::test
