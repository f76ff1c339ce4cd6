// Rows whose target lies far from the other logits: hopeless ones, far below them, and confident
// ones, far above. Farther than fp32 has exponents for, seen from the target's logit, which is
// where Hopper's kernels look from by rows: they do the chunk of such a row again (docs/math.md,
// "Reference exponents").
#include "check.h"
#include "core/text.h"

namespace cutloss::test {
namespace {

// From the target's logit and 15 more, sums of exponentials between these count as near.
constexpr double kAbove = 15, kLeastLogSum = -69.1, kMostLogSum = 46.1;

// Two columns of C are on the last axis alone but for noise, no other is on it: the last element
// of a row of E says how far the row's target is from the other logits.
constexpr std::int64_t kUp = 200, kDown = 301;
constexpr double kLever = 4;

struct FarRow {
  std::int64_t row;
  double z;  // of its target, more or less; the others are between -10 and 10
};
constexpr FarRow kFarRows[] = {{300, -95}, {301, 70}, {402, -125}, {403, 100}, {480, -64}};

bool is_far(std::int64_t row) {
  return std::any_of(std::begin(kFarRows), std::end(kFarRows),
                     [&](const FarRow& far) { return far.row == row; });
}

// Rows are ignored here and there. Without `far` the rows are as near as all others.
Data data_with_far_rows(const Case& c, bool far = true) {
  Data data = make_data(c);
  const Problem& p = data.problem;
  const Head& head = head_of(p);
  const std::int64_t last = head.D - 1;
  for (std::int64_t v = 0; v < head.classes.count; ++v) {
    data.c.set(v * head.c_row_stride + last, v == kUp ? kLever : v == kDown ? -kLever : 0);
  }
  for (std::int64_t n = 4; n < row_count(p); n += 9) {
    if (!is_far(n)) data.set_target(n, p.rows.ignore_index);
  }
  for (const auto& [row, z] : kFarRows) {
    data.set_target(row, z > 0 ? kUp : kDown);
    if (!far) continue;
    double a = z * detail::row_temperature(data, row);
    if (p.transform.softcap) a = *p.transform.softcap * std::atanh(a / *p.transform.softcap);
    data.e.set(data.e_offset(row) + last, std::fabs(a) / kLever / p.transform.logit_scale);
  }
  return data;
}

// That the data is what the tests are about.
void expect_far_rows_alone(const reference::Result& r) {
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    const double* z = r.z.data() + n * r.V;
    double sum = 0;  // of e^(z - maximum), without the target
    for (std::int64_t v = 0; v < r.V; ++v) {
      if (v != r.target[n]) sum += std::exp(z[v] - r.row_max[n]);
    }
    const double log_sum = std::log(sum) + r.row_max[n] - (z[r.target[n]] + kAbove);
    EXPECT_EQ(log_sum < kLeastLogSum || log_sum > kMostLogSum, is_far(n))
        << "row " << n << ": the logarithm of its sum is " << log_sum;
  }
}

Truth truth_of(const std::string& engine, const Case& c, const Data& data) {
  Truth truth(engine, c, data);
  truth.errors_are_independent = false;  // a few rows have most of them
  return truth;
}

std::vector<Case> cases() {
  Case plain = with_size(1, 600, 403, 8);
  plain.ignored = 0;  // data_with_far_rows chooses
  plain.name = "plain";
  Case scaled = plain;
  head_of(scaled.problem).has_bias = scaled.problem.wanted.dbias.wanted = true;
  scaled.problem.transform.temperature = 1.25;
  scaled.problem.rows.has_temperature = true;
  scaled.problem.transform.logit_scale = 0.75;
  scaled.lse_gradient = true;
  scaled.name = "scaled";
  Case capped = scaled;
  capped.problem.transform.softcap = 250;
  capped.name = "capped";
  capped.problem.rows.has_temperature = false;  // the cap has room for 125 * 1.25
  return {plain, scaled, capped};
}

using FarRows = EverySubject;

TEST_P(FarRows, WithinBoundsInEveryMode) {
  const Case& c = GetParam().problem;
  const Data data = data_with_far_rows(c);
  const Truth truth = truth_of(GetParam().engine, c, data);
  expect_far_rows_alone(truth.want);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, FarRows, testing::ValuesIn(subjects(cases())), subject_name);

#ifdef CUTLOSS_CUDA

// The chunk of a row: those that count, in order, divide into chunks.
std::int64_t chunk_of(const Plan& plan, const Data& data, std::int64_t row) {
  std::int64_t before = 0;
  for (std::int64_t n = 0; n < row; ++n) before += data.counts(n) ? 1 : 0;
  return before / plan.chunk_rows;
}

// Bits of the rows that are not far.
void expect_the_others_as_in(const Outputs& want, const Outputs& got, std::int64_t D) {
  for (std::int64_t n = 0; n < want.nll.count; ++n) {
    if (is_far(n)) continue;
    EXPECT_EQ(got.nll.get(n), want.nll.get(n)) << "row " << n;
    EXPECT_EQ(got.lse.get(n), want.lse.get(n)) << "row " << n;
    for (std::int64_t i = n * D; i < (n + 1) * D; ++i) ASSERT_EQ(got.de.get(i), want.de.get(i));
  }
}

TEST(FarRowsOnHopper, OneChunkIsDoneAgain) {
  const std::string engine = "cuda/fused_sm90";
  const std::vector<std::string> names = engine_names();
  if (std::find(names.begin(), names.end(), engine) == names.end()) {
    GTEST_SKIP() << describe_machine()[0];
  }
  for (Case c : cases()) {
    for (const Types& types : {kTypes[1], kTypes[4], kTypes[5]}) {  // bf16, autocast
      SCOPED_TRACE(text(c.name, " ", types.name));
      set_types(c.problem, types);
      const Data data = data_with_far_rows(c);
      const Plan plan = plan_for(data.problem, engine, kModes[1]);
      SCOPED_TRACE(describe(plan));
      ASSERT_EQ(plan.engine, engine);
      ASSERT_EQ(plan.schedule, Schedule::rows);
      ASSERT_FALSE(plan.keeps_logits);
      ASSERT_GE(chunk_count(plan), 3);
      for (const FarRow& far : kFarRows) ASSERT_EQ(chunk_of(plan, data, far.row), 1);

      expect_accurate(plan, data, truth_of(engine, c, data));
      const Outputs first = run(plan, data);
      for (int i = 0; i < 20; ++i) ASSERT_EQ(run(plan, data).first_difference(first), "") << i;
      const Data near = data_with_far_rows(c, /*far=*/false);
      expect_the_others_as_in(run(plan, near), first, head_of(plan.problem).D);
    }
  }
}

#endif  // CUTLOSS_CUDA

}  // namespace
}  // namespace cutloss::test
