// Label smoothing's part of a loss, W lse / V - zbar, where all logits of a row have a common
// offset: as W log_sum / V - zbar_centred it has the digits that the logits have among each other.
#include "check.h"
#include "core/text.h"

namespace cutloss::test {
namespace {

using Smoothing = EverySubject;

// Products of small numbers, and of one large one: sums of them are exact in fp32, so that the
// statistics alone are what may go wrong.
void set_exact_logits(Data& data, double offset) {
  const Problem& p = data.problem;
  const Head& head = head_of(p);
  const double of_e = offset / 100;
  for (std::int64_t v = 0; v < head.classes.count; ++v) {
    for (std::int64_t d = 0; d < head.D; ++d) {
      const double small = static_cast<double>((7 * v + 5 * d) % 17 - 8) / 8;
      data.c.set(v * head.c_row_stride + d, d == 0 ? 100 : small);
    }
  }
  for (std::int64_t n = 0; n < row_count(p); ++n) {
    if (!data.counts(n)) continue;
    const std::int64_t e = data.e_offset(reference::position_of_row(p, n));
    for (std::int64_t d = 0; d < head.D; ++d) {
      data.e.set(e + d, d == 0 ? of_e : static_cast<double>((n + 3 * d) % 5 - 2) / 2);
    }
  }
}

TEST_P(Smoothing, KeepsItsDigitsUnderAnOffset) {
  Data data = make_data(GetParam().problem);
  const Problem& p = data.problem;
  const std::int64_t V = classes_of(p).count;
  double weights = 0;  // W / V
  for (std::int64_t v = 0; v < V; ++v) {
    weights += detail::stat_or(data.class_weight, v, 1.0) / static_cast<double>(V);
  }
  for (const double offset : {1e4, -3e4}) {
    SCOPED_TRACE(offset);
    set_exact_logits(data, offset);
    const reference::Result want = truth_for(GetParam().engine, data);
    const double u = detail::rounding_units(p, want.compute_type).accumulator;
    const double sum = gamma(u, V);
    std::vector<double> smooth(want.N, 0), bound(want.N, 0);
    for (std::int64_t n = 0; n < want.N; ++n) {
      if (want.target[n] < 0) continue;
      double distance = 0;
      for (std::int64_t v = 0; v < V; ++v) {
        distance += detail::stat_or(data.class_weight, v, 1.0) *
                    (want.row_max[n] - want.z[n * V + v]) / static_cast<double>(V);
      }
      smooth[n] = weights * want.log_sum[n] - want.zbar_centred[n];
      bound[n] = weights * (sum + 8 * u + 4 * u * want.log_sum[n]) + distance * sum;
    }
    for (const Mode& mode : modes_of(GetParam().engine, p)) {
      SCOPED_TRACE(mode.name);
      const Outputs got = run(plan_for(p, GetParam().engine, mode), data);
      std::vector<double> values(want.N);
      for (std::int64_t n = 0; n < want.N; ++n) {
        values[n] = weights * got.log_sum.get(n) - got.zbar_centred.get(n);
      }
      EXPECT_EQ(outside("smoothing", values, smooth, bound), "");
    }
  }
}

std::vector<Case> offsets() {
  std::vector<Case> cases;
  for (const bool weighted : {false, true}) {
    for (const std::int64_t V : {1, 2, 193, 1043}) {
      Case c = with_size(2, 39, V, 16, 1);
      c.problem.wanted.zbar = c.problem.upstream.zbar = true;
      c.problem.has_class_weight = weighted;
      c.name = text("V", V, weighted ? "_weighted" : "");
      cases.push_back(c);
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Offsets, Smoothing, testing::ValuesIn(subjects(offsets())), subject_name);

}  // namespace
}  // namespace cutloss::test
