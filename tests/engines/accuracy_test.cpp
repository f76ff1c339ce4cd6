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
// Many more classes than rows, so that dE's sums may wait in dC, with every kind of place that the
// rows of E may have; what lies in rows that do not count is no number.
using FewRows = EverySubject;

TEST_P(FewRows, WithinBoundsInEveryMode) {
  const Case& c = GetParam().problem;
  Data data = make_data(c);
  const Truth truth(GetParam().engine, c, data);
  const Problem& p = data.problem;
  std::vector<bool> counts(p.rows.sequences * p.rows.length, false);
  for (std::int64_t n = 0; n < row_count(p); ++n) {
    if (data.counts(n)) counts[reference::position_of_row(p, n)] = true;
  }
  for (std::size_t position = 0; position < counts.size(); ++position) {
    for (std::int64_t d = 0; !counts[position] && d < head_of(p).D; ++d) {
      data.e.set(data.e_offset(static_cast<std::int64_t>(position)) + d, std::nan(""));
    }
  }
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
  }
}

std::vector<Case> few_rows() {
  std::vector<Case> cases;
  for (const double ignored : {0.0, 0.01, 0.5}) {
    Case c = with_size(1, 600, 2503, 32);
    c.ignored = ignored;
    c.name = "ignored_" + std::to_string(static_cast<int>(100 * ignored));
    cases.push_back(c);
  }
  Case sequences = with_size(3, 200, 2503, 32, 1);
  sequences.ignored = 0.1;
  sequences.name = "sequences";
  cases.push_back(sequences);
  Case apart = sequences;
  apart.extra_sequence_stride = 8;
  apart.name = "sequences_apart";
  cases.push_back(apart);
  Case everything = with_size(1, 150, 2503, 40);
  add_everything(everything);
  everything.name = "everything";
  cases.push_back(everything);
  Case rows = with_size(1, 1300, 3001, 16);  // in the last columns several blocks of them
  rows.ignored = 0.3;
  rows.name = "blocks_of_rows";
  cases.push_back(rows);
  Case capped = with_size(1, 150, 2503, 40);
  capped.problem.transform.softcap = 2.0;
  capped.name = "softcap";
  cases.push_back(capped);
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Engines, FewRows, testing::ValuesIn(subjects(few_rows())), subject_name);
INSTANTIATE_TEST_SUITE_P(Sizes, Accuracy, testing::ValuesIn(subjects(size_cases())), subject_name);
INSTANTIATE_TEST_SUITE_P(SizesWithEveryOption, Accuracy,
                         testing::ValuesIn(subjects(sizes_with_every_option())), subject_name);
INSTANTIATE_TEST_SUITE_P(Options, Accuracy, testing::ValuesIn(subjects(options())), subject_name);
INSTANTIATE_TEST_SUITE_P(Logits, Accuracy, testing::ValuesIn(subjects(kinds_of_logits())),
                         subject_name);

}  // namespace
}  // namespace cutloss::test
