// Problems that nobody thought of: sizes, dtypes, options, strides, schedules and workspaces drawn
// at random. A failure names its seed, which makes the problem again.
#include <algorithm>

#include "check.h"

namespace cutloss::test {
namespace {

constexpr int kSeedsPerTest = 25;

Case random_case(std::mt19937_64& random, unsigned seed) {
  const auto up_to = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const auto one_in = [&](std::int64_t n) { return up_to(1, n) == 1; };
  const std::int64_t length = up_to(1, 160);
  Case c = with_size(up_to(1, 3), length, one_in(4) ? up_to(1, 20) : up_to(1, 1800),
                     one_in(4) ? 1 : up_to(1, 70), one_in(2) ? up_to(0, length - 1) / 4 : 0);
  // All options but those that take gradients away, each in one of four problems.
  for (const Option& option : kOptions) {
    const std::string name = option.name;
    if (name.starts_with("only_") || name == "de_dbias" || name == "everything") continue;
    if (one_in(4)) option.apply(c);
  }
  if (one_in(8)) add_everything(c);
  Problem& p = c.problem;
  set_types(p, kTypes[up_to(0, std::size(kTypes) - 1)]);
  p.wanted.de.wanted = !one_in(4);
  p.wanted.dc.wanted = !one_in(4);
  p.wanted.dbias.wanted = head_of(p).has_bias && !one_in(4);
  c.logits = static_cast<LogitKind>(up_to(0, 3));
  c.ignored = one_in(6) ? up_to(0, 1) : 0.3;
  c.seed = seed;
  return c;
}

// Any workspace from the smallest to one where nothing is short.
Plan random_plan(Problem problem, std::mt19937_64& random) {
  const Mode& mode =
      kModes[std::uniform_int_distribution<std::size_t>(0, std::size(kModes) - 1)(random)];
  const bool any = std::uniform_int_distribution<int>(0, 3)(random) == 0;
  problem.schedule =
      any || !takes(problem.engine, problem, mode) ? Schedule::automatic : mode.schedule;
  problem.upstream.when = mode.upstream;
  const double factor = std::exp(std::uniform_real_distribution<double>(0, 4)(random));
  problem.max_workspace =
      static_cast<std::int64_t>(factor * static_cast<double>(smallest_workspace(problem)));
  return make_plan(problem);
}

class Random : public testing::TestWithParam<unsigned> {};

TEST_P(Random, ProblemsWithinBounds) {
  for (unsigned seed = GetParam(); seed < GetParam() + kSeedsPerTest; ++seed) {
    for (const std::string& engine : engine_names()) {
      std::mt19937_64 random(seed);
      const Case c = random_case(random, seed);
      if (!takes(engine, problem_of(c))) continue;
      Data data = make_data(c);
      set_engine(data.problem, engine);
      const Plan plan = random_plan(data.problem, random);
      SCOPED_TRACE("seed " + std::to_string(seed) + ", " + c.name + "\n" + describe(plan));
      expect_accurate(plan, data, Truth(engine, c, data));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Random, testing::Range(0u, 400u, unsigned{kSeedsPerTest}));

}  // namespace
}  // namespace cutloss::test
