// One body over every engine, schedule, dtype, size, option and kind of logits: outputs and
// gradients within the bounds of tolerance.h of the fp64 reference.
#include "check.h"

namespace cutloss::test {
namespace {

using Accuracy = EverySubject;

TEST_P(Accuracy, WithinBoundsInEveryMode) {
  const Case& c = GetParam().problem;
  const Data data = make_data(c);
  const Truth truth(GetParam().engine, c, data);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
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
    Case c = with_size(2, 39, 1043, 24, 1);
    option.apply(c);
    c.name = option.name;
    cases.push_back(c);
  }
  // Rows of E in sequences that predict less than all of them, and one after the other.
  for (const Option& option : kGradientOptions) {
    for (const std::int64_t sequences : {1, 3}) {
      Case c = with_size(sequences, 39, 1043, 24, sequences - 1);
      option.apply(c);
      c.name = option.name + ("_" + std::to_string(sequences));
      cases.push_back(c);
    }
  }
  return cases;
}

std::vector<Case> kinds_of_logits() {
  std::vector<Case> cases;
  const std::pair<const char*, LogitKind> kinds[] = {
      {"peaked", LogitKind::peaked}, {"flat", LogitKind::flat}, {"offset", LogitKind::offset}};
  for (const auto& [name, kind] : kinds) {
    for (const bool everything : {false, true}) {
      Case c = with_size(1, 67, 1043, 24);
      c.logits = kind;
      if (everything) add_everything(c);
      c.name = std::string(name) + (everything ? "_everything" : "");
      cases.push_back(c);
    }
  }
  return cases;
}

std::vector<Case> saturated() { return saturated_cases(with_size(2, 39, 1043, 24, 1)); }

INSTANTIATE_TEST_SUITE_P(SaturatedSoftcap, Accuracy, testing::ValuesIn(subjects(saturated())),
                         subject_name);
INSTANTIATE_TEST_SUITE_P(Sizes, Accuracy, testing::ValuesIn(subjects(size_cases())), subject_name);
INSTANTIATE_TEST_SUITE_P(SizesWithEveryOption, Accuracy,
                         testing::ValuesIn(subjects(sizes_with_every_option())), subject_name);
INSTANTIATE_TEST_SUITE_P(Options, Accuracy, testing::ValuesIn(subjects(options())), subject_name);
INSTANTIATE_TEST_SUITE_P(Logits, Accuracy, testing::ValuesIn(subjects(kinds_of_logits())),
                         subject_name);

}  // namespace
}  // namespace cutloss::test
