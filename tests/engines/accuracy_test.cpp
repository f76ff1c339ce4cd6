// One body over every engine, schedule, dtype, size, option and kind of logits: outputs and
// gradients within the bounds of tolerance.h of the fp64 reference.
#include "engines.h"
#include "tolerance.h"

namespace cutloss::test {
namespace {

// The logit that was called the largest is the largest, but for rounding; ignored rows get -1.
std::string wrong_argmax(const std::vector<std::int64_t>& got, const reference::Result& want,
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

void expect_accurate(const Data& data, const reference::Result& want, const Bounds& bound,
                     bool independent_errors, const std::string& engine, const Mode& mode) {
  SCOPED_TRACE(mode.name);
  const Plan plan = plan_for(data.problem, engine, mode);
  bool intact = false;
  const Outputs got = run(plan, data, &intact);
  EXPECT_TRUE(intact) << "wrote outside the memory it was given";
  const auto check = [&](const char* what, const Array& array, const std::vector<double>& expected,
                         const std::vector<double>& allowed) {
    EXPECT_EQ(outside(what, array.values(), expected, allowed), "");
  };
  check("nll", got.nll, want.nll, bound.nll);
  check("lse", got.lse, want.lse, bound.lse);
  std::vector<double> lse_in_parts = got.row_max.values();
  for (std::int64_t n = 0; n < want.N; ++n) lse_in_parts[n] += got.log_sum.get(n);
  EXPECT_EQ(outside("row_max + log_sum", lse_in_parts, want.lse, bound.lse), "");
  for (std::int64_t n = 0; n < want.N; ++n) EXPECT_GE(got.nll.get(n), 0) << "row " << n;

  const Problem& p = data.problem;
  if (p.wants_entropy) check("entropy", got.entropy, want.entropy, bound.entropy);
  if (p.wants_zbar) check("zbar", got.zbar, want.zbar, bound.zbar);
  if (p.wants_argmax) {
    EXPECT_EQ(wrong_argmax(got.argmax, want, bound), "");
  }
  if (p.needs_de) check("de", got.de, want.de, bound.de);
  if (p.needs_dc) check("dc", got.dc, want.dc, bound.dc);
  if (p.needs_dbias) check("dbias", got.dbias, want.dbias, bound.dbias);

  // Rule 2 needs many errors, independent of each other.
  if (!independent_errors) return;
  const auto check_rms = [](const char* what, const Array& array,
                            const std::vector<double>& expected, double allowed) {
    const double error = root_mean_square_error(array.values(), expected);
    EXPECT_LE(error, kRmsSlack * allowed) << what << " (root mean square)";
  };
  if (p.needs_de) check_rms("de", got.de, want.de, bound.de_rms);
  if (p.needs_dc) check_rms("dc", got.dc, want.dc, bound.dc_rms);
}

using Accuracy = EverySubject;

TEST_P(Accuracy, WithinBoundsInEveryMode) {
  const Case& c = GetParam().problem;
  const Data data = make_data(c);
  const reference::Result want = truth_for(GetParam().engine, data);
  const Bounds bound = bounds(data, want);
  const bool independent_errors =
      want.compute_type == DType::bf16 && c.logits == Logits::random && want.de.size() >= 1000;
  for (const Mode& mode : kModes) {
    expect_accurate(data, want, bound, independent_errors, GetParam().engine, mode);
  }
}

std::vector<Case> sizes_with_every_option() {
  std::vector<Case> cases = size_cases();
  for (Case& c : cases) add_everything(c);
  return cases;
}

std::vector<Case> options() {
  std::vector<Case> cases;
  for (const Option& option : kOptions) {
    Case c = with_size(2, 39, 1043, 20, 1);
    option.apply(c);
    c.name = option.name;
    cases.push_back(c);
  }
  return cases;
}

std::vector<Case> kinds_of_logits() {
  std::vector<Case> cases;
  const std::pair<const char*, Logits> kinds[] = {
      {"peaked", Logits::peaked}, {"flat", Logits::flat}, {"offset", Logits::offset}};
  for (const auto& [name, kind] : kinds) {
    for (const bool everything : {false, true}) {
      Case c = with_size(1, 67, 1043, 20);
      c.logits = kind;
      if (everything) add_everything(c);
      c.name = std::string(name) + (everything ? "_everything" : "");
      cases.push_back(c);
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Sizes, Accuracy, testing::ValuesIn(subjects(size_cases())), subject_name);
INSTANTIATE_TEST_SUITE_P(SizesWithEveryOption, Accuracy,
                         testing::ValuesIn(subjects(sizes_with_every_option())), subject_name);
INSTANTIATE_TEST_SUITE_P(Options, Accuracy, testing::ValuesIn(subjects(options())), subject_name);
INSTANTIATE_TEST_SUITE_P(Logits, Accuracy, testing::ValuesIn(subjects(kinds_of_logits())),
                         subject_name);

}  // namespace
}  // namespace cutloss::test
