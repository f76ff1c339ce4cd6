// The truth itself: the reference's gradients against differences of its outputs, and its
// outputs against values that follow by hand.
#include "reference/reference.h"

#include <gtest/gtest.h>

#include <cmath>

#include "problems.h"

namespace cutloss::test {
namespace {

// sum_n upstream[n] * output[n]
double loss(const Data& data) {
  const reference::Result r = reference::evaluate(data.problem, data.inputs());
  double sum = 0;
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    sum += data.d_nll.get(n) * r.nll[n];
    if (data.d_lse.count != 0) sum += data.d_lse.get(n) * r.lse[n];
    if (data.d_lse_squared.count != 0) sum += data.d_lse_squared.get(n) * r.lse[n] * r.lse[n];
    if (data.d_entropy.count != 0) sum += data.d_entropy.get(n) * r.entropy[n];
    if (data.d_zbar.count != 0) sum += data.d_zbar.get(n) * r.zbar[n];
  }
  return sum;
}

double difference_quotient(Data& data, Array& array, std::int64_t index) {
  const double value = array.get(index);
  const double step = 1e-5;
  array.set(index, value + step);
  const double above = loss(data);
  array.set(index, value - step);
  const double below = loss(data);
  array.set(index, value);
  return (above - below) / (2 * step);
}

class ReferenceGradients : public testing::TestWithParam<Option> {};

TEST_P(ReferenceGradients, AreTheDerivativesOfItsOutputs) {
  Case c = with_size(2, 4, 9, 5, 1);
  set_types(c.problem, {"f64", DType::f64, DType::f64, DType::f64, DType::f64});
  GetParam().apply(c);
  Data data = make_data(c);
  const Problem& p = data.problem;
  const Head& head = head_of(p);
  const reference::Result r = reference::evaluate(p, data.inputs(), data.upstream64());
  for (std::int64_t position = 0; position < p.rows.sequences * p.rows.length; ++position) {
    for (std::int64_t d = 0; d < head.D; ++d) {
      const double got = r.de[position * head.D + d];
      if (std::isnan(data.e.get(data.e_offset(position) + d))) {
        EXPECT_EQ(got, 0) << "a position that does not count";
        continue;
      }
      EXPECT_NEAR(got, difference_quotient(data, data.e, data.e_offset(position) + d), 1e-8);
    }
  }
  for (std::int64_t v = 0; v < head.classes.count; ++v) {
    for (std::int64_t d = 0; d < head.D; ++d) {
      EXPECT_NEAR(r.dc[v * head.D + d],
                  difference_quotient(data, data.c, v * head.c_row_stride + d), 1e-8);
    }
    if (head.has_bias) {
      EXPECT_NEAR(r.dbias[v], difference_quotient(data, data.bias, v), 1e-8);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Options, ReferenceGradients, testing::ValuesIn(kOptions),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Reference, FlatLogitsHaveKnownStatistics) {
  Case c = with_size(1, 6, 11, 4);
  c.logits = LogitKind::flat;
  c.ignored = 0;
  c.problem.wanted.entropy = c.problem.wanted.zbar = c.problem.wanted.argmax = true;
  const Data data = make_data(c);
  const reference::Result r = reference::evaluate(data.problem, data.inputs());
  for (std::int64_t n = 0; n < r.N; ++n) {
    EXPECT_NEAR(r.nll[n], std::log(11), 1e-14);
    EXPECT_NEAR(r.entropy[n], std::log(11), 1e-14);
    EXPECT_NEAR(r.lse[n], r.zbar[n] + std::log(11), 1e-14);
    EXPECT_EQ(r.argmax[n], 0);
  }
}

// One logit 0 at the target and one 50 below: nll = log1p(e^-50), which 1 - p cannot express.
TEST(Reference, NllKeepsItsDigitsOnConfidentRows) {
  Case c = with_size(1, 1, 2, 1);
  set_types(c.problem, kTypes[2]);
  c.ignored = 0;
  Data data = make_data(c);
  data.e.set(0, 1);
  data.c.set(0, 0);
  data.c.set(1, -50);
  data.set_target(0, 0);
  const reference::Result r =
      reference::evaluate(data.problem, data.inputs(), {{1.0}, {}, {}, {}, {}});
  EXPECT_DOUBLE_EQ(r.nll[0], std::exp(-50));
  EXPECT_DOUBLE_EQ(r.g[0], -std::exp(-50));
  EXPECT_DOUBLE_EQ(r.g[1], std::exp(-50));
  EXPECT_DOUBLE_EQ(r.de[0], -50 * std::exp(-50));
}

TEST(Reference, RefusesATargetOutsideTheVocabulary) {
  Data data = make_data(with_size(1, 4, 10, 3));
  data.set_target(2, 10);
  try {
    reference::evaluate(data.problem, data.inputs());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "target at position 2 is 10, outside [0, 10)");
  }
}

// The call with pointers writes what the call with vectors computes.
TEST(Reference, ForwardAndBackwardFollowTheContractOfTheApi) {
  Case c = with_size(2, 5, 13, 6, 1);
  add_everything(c);
  set_types(c.problem, kTypes[1]);
  const Data data = make_data(c);
  const Problem& p = data.problem;
  const std::int64_t N = 8;
  Array nll(DType::f32, N), lse(DType::f32, N), row_max(DType::f32, N), log_sum(DType::f32, N),
      entropy(DType::f32, N), zbar(DType::f32, N);
  Array de(DType::bf16, 10 * 6), dc(DType::bf16, 13 * 6), dbias(DType::bf16, 13);
  std::vector<std::int64_t> argmax(N);
  Args args;
  args.in = data.inputs();
  args.rows = {nll.pointer(),     lse.pointer(),  row_max.pointer(), log_sum.pointer(),
               entropy.pointer(), zbar.pointer(), argmax.data()};
  args.upstream = data.upstream();
  args.gradients = {de.pointer(), dc.pointer(), dbias.pointer()};
  reference::forward(p, args);
  reference::backward(p, args);

  const reference::Result r = reference::evaluate(p, data.inputs(), data.upstream64());
  const auto expect_rounded = [](const Array& got, const std::vector<double>& want) {
    ASSERT_EQ(got.count, static_cast<std::int64_t>(want.size()));
    for (std::int64_t i = 0; i < got.count; ++i) {
      EXPECT_EQ(got.get(i), reference::rounded(want[i], got.type));
    }
  };
  expect_rounded(nll, r.nll);
  expect_rounded(lse, r.lse);
  expect_rounded(row_max, r.row_max);
  expect_rounded(log_sum, r.log_sum);
  expect_rounded(entropy, r.entropy);
  expect_rounded(zbar, r.zbar);
  expect_rounded(de, r.de);
  expect_rounded(dc, r.dc);
  expect_rounded(dbias, r.dbias);
  EXPECT_EQ(argmax, r.argmax);
}

}  // namespace
}  // namespace cutloss::test
