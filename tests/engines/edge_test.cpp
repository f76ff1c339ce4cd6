// What lies at the edges: no rows, infinities and NaNs among the logits, equal logits, confident
// rows, more logits than 2^31.
#include <cmath>
#include <cstring>
#include <limits>

#include "engines.h"
#include "tolerance.h"

namespace cutloss::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

bool all_zero(const Array& array) {
  for (std::int64_t i = 0; i < array.count; ++i) {
    if (array.get(i) != 0) return false;
  }
  return true;
}

// Calls check(mode, outputs) for every mode.
template <class Check>
void for_each_mode(const Data& data, const std::string& engine, Check check) {
  for (const Mode& mode : modes_of(engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    bool intact = false;
    const Outputs out = run(plan_for(data.problem, engine, mode), data, &intact);
    EXPECT_TRUE(intact);
    check(out);
  }
}

// 40 rows, each of which counts; the bias of some columns is theirs to set.
Case with_bias() {
  Case c = with_size(1, 40, 333, 16);
  head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = true;
  c.problem.wanted.entropy = c.problem.upstream.entropy = true;
  c.problem.wanted.argmax = true;
  c.ignored = 0;
  c.name = "with_bias";
  return c;
}

// Without what an engine may leave to other schedules: exponentials are kept.
Case with_bias_alone() {
  Case c = with_bias();
  c.problem.wanted.entropy = c.problem.upstream.entropy = c.problem.wanted.argmax = false;
  c.name = "with_bias_alone";
  return c;
}

void expect_as_reference(const std::string& engine, const Data& data, const Outputs& got) {
  const reference::Result want = truth_for(engine, data);
  const Bounds bound = bounds(data, want);
  EXPECT_EQ(outside("nll", got.nll.values(), want.nll, bound.nll), "");
  EXPECT_EQ(outside("lse", got.lse.values(), want.lse, bound.lse), "");
  if (got.entropy.count > 0) {
    EXPECT_EQ(outside("entropy", got.entropy.values(), want.entropy, bound.entropy), "");
  }
  EXPECT_EQ(outside("de", got.de.values(), want.de, bound.de), "");
  EXPECT_EQ(outside("dc", got.dc.values(), want.dc, bound.dc), "");
  EXPECT_EQ(outside("dbias", got.dbias.values(), want.dbias, bound.dbias), "");
}

using Edge = EverySubject;

TEST_P(Edge, NoRowsMakeZeroGradients) {
  for (const auto& [sequences, length] : {std::pair{1, 0}, std::pair{0, 5}, std::pair{0, 0}}) {
    Case c = GetParam().problem;
    c.problem.rows.sequences = sequences;
    c.problem.rows.length = length;
    const Data data = make_data(c);
    for_each_mode(data, GetParam().engine, [](const Outputs& out) {
      EXPECT_TRUE(all_zero(out.dc));
      EXPECT_TRUE(all_zero(out.dbias));
    });
  }
}

// Sequences of one token, say: the shift leaves no row, and all of dE is nobody's.
TEST_P(Edge, AShiftOfTheLengthOrMoreMakesZeroGradients) {
  for (const auto& [length, shift] :
       {std::pair{1, 1}, std::pair{1, 5}, std::pair{3, 3}, std::pair{3, 4}, std::pair{0, 1}}) {
    SCOPED_TRACE(shift);
    Case c = GetParam().problem;
    c.problem.rows.sequences = 4;
    c.problem.rows.length = length;
    c.problem.rows.shift = shift;
    const Data data = make_data(c);
    ASSERT_EQ(row_count(data.problem), 0);
    for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
      EXPECT_EQ(out.nll.count, 0);
      EXPECT_EQ(out.de.count, 4 * length * head_of(data.problem).D);
      EXPECT_TRUE(all_zero(out.de));
      EXPECT_TRUE(all_zero(out.dc));
      EXPECT_TRUE(all_zero(out.dbias));
    });
  }
}

TEST_P(Edge, IgnoredRowsAloneMakeZeros) {
  Case c = GetParam().problem;
  c.ignored = 1;
  const Data data = make_data(c);
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    for (const Array* array : {&out.nll, &out.lse, &out.row_max, &out.log_sum, &out.entropy,
                               &out.de, &out.dc, &out.dbias}) {
      EXPECT_TRUE(all_zero(*array));
    }
    if (data.problem.wanted.argmax) {
      EXPECT_EQ(out.argmax, std::vector<std::int64_t>(row_count(data.problem), -1));
    }
  });
}

// A token that may not be said: its probability and gradients are exactly 0.
TEST_P(Edge, MinusInfinityInTheBiasTakesAColumnOut) {
  Data data = make_data(GetParam().problem);
  for (std::int64_t v = 3; v < classes_of(data.problem).count; v += 5) data.bias.set(v, -kInf);
  for (std::int64_t n = 0; n < row_count(data.problem); ++n) {
    if (data.target(n) % 5 == 3) data.set_target(n, data.target(n) - 1);
  }
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    expect_as_reference(GetParam().engine, data, out);
    for (std::int64_t v = 3; v < classes_of(data.problem).count; v += 5) {
      ASSERT_EQ(out.dbias.get(v), 0) << "column " << v;
    }
  });
}

// PyTorch's meaning: the loss is infinite, the gradient is p - onehot.
TEST_P(Edge, ATargetAtMinusInfinityHasAnInfiniteNll) {
  Data data = make_data(GetParam().problem);
  data.bias.set(7, -kInf);
  data.set_target(2, 7);
  if (data.d_entropy.count > 0) data.d_entropy.set(2, 0);
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    EXPECT_EQ(out.nll.get(2), kInf);
    expect_as_reference(GetParam().engine, data, out);
  });
}

TEST_P(Edge, SoftcapMakesInfinitiesFinite) {
  Case c = GetParam().problem;
  c.problem.transform.softcap = 3.0;
  Data data = make_data(c);
  data.bias.set(7, -kInf);
  data.bias.set(8, kInf);
  for_each_mode(data, GetParam().engine,
                [&](const Outputs& out) { expect_as_reference(GetParam().engine, data, out); });
}

// nll is NaN where PyTorch's is; other rows are as if this one were not there.
TEST_P(Edge, ANaNInOneRowOfEStaysInThatRow) {
  for (const double bad : {std::nan(""), kInf, -kInf}) {
    Case c = GetParam().problem;
    c.problem.wanted.dc.wanted = c.problem.wanted.dbias.wanted = false;
    Data data = make_data(c);
    const Head& head = head_of(data.problem);
    Data without = make_data(c);
    const std::int64_t row = 5;
    data.e.set(row * head.e_row_stride + 1, bad);
    for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
      SCOPED_TRACE(mode.name);
      const Plan plan = plan_for(data.problem, GetParam().engine, mode);
      const Outputs got = run(plan, data);
      const Outputs want = run(plan, without);
      for (std::int64_t n = 0; n < row_count(data.problem); ++n) {
        const double nll = got.nll.get(n);
        if (n == row) {
          EXPECT_TRUE(std::isnan(nll)) << nll;
          if (got.entropy.count > 0) {
            EXPECT_TRUE(std::isnan(got.entropy.get(n)));
          }
          EXPECT_FALSE(std::isfinite(got.lse.get(n)));
        } else {
          EXPECT_EQ(nll, want.nll.get(n));
        }
        for (std::int64_t d = 0; d < head.D; ++d) {
          const std::int64_t i = n * head.D + d;
          if (n == row) {
            EXPECT_TRUE(std::isnan(got.de.get(i)));
          } else {
            EXPECT_EQ(got.de.get(i), want.de.get(i));
          }
        }
      }
    }
  }
}

TEST_P(Edge, ANaNRowMakesTheGradientsOfCNaN) {
  Data data = make_data(GetParam().problem);
  data.e.set(5 * head_of(data.problem).e_row_stride + 1, std::nan(""));
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    for (std::int64_t i = 0; i < out.dc.count; ++i) ASSERT_TRUE(std::isnan(out.dc.get(i))) << i;
    for (std::int64_t v = 0; v < out.dbias.count; ++v) ASSERT_TRUE(std::isnan(out.dbias.get(v)));
  });
}

TEST_P(Edge, PlusInfinityMakesEveryRowNaN) {
  Data data = make_data(GetParam().problem);
  data.bias.set(7, kInf);
  data.set_target(3, 7);  // the target itself
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    for (std::int64_t n = 0; n < out.nll.count; ++n) {
      EXPECT_TRUE(std::isnan(out.nll.get(n))) << "row " << n;
      EXPECT_FALSE(std::isfinite(out.lse.get(n))) << "row " << n;
    }
    EXPECT_TRUE(std::isnan(out.de.get(0)));
    EXPECT_TRUE(std::isnan(out.de.get(3 * head_of(data.problem).D)));
  });
}

TEST_P(Edge, NothingButMinusInfinityMakesEveryRowNaN) {
  Data data = make_data(GetParam().problem);
  for (std::int64_t v = 0; v < classes_of(data.problem).count; ++v) data.bias.set(v, -kInf);
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    for (std::int64_t n = 0; n < out.nll.count; ++n) {
      EXPECT_TRUE(std::isnan(out.nll.get(n))) << "row " << n;
      EXPECT_FALSE(std::isfinite(out.lse.get(n))) << "row " << n;
    }
    for (const Array* array : {&out.de, &out.dc, &out.dbias}) {
      for (std::int64_t i = 0; i < array->count; ++i) ASSERT_TRUE(std::isnan(array->get(i))) << i;
    }
  });
}

// Small integers are exact in every dtype, so that equal logits are equal to the bit. The first
// of them is the prediction, wherever slabs and vectors begin.
TEST_P(Edge, TheFirstOfEqualLogitsIsTheArgmax) {
  if (!GetParam().problem.problem.wanted.argmax) GTEST_SKIP() << "asks for no argmax";
  Case c = GetParam().problem;
  classes_of(c.problem).count = 2051;
  Data data = make_data(c);
  const Problem& p = data.problem;
  const Head& head = head_of(p);
  for (std::int64_t n = 0; n < row_count(p); ++n) {
    for (std::int64_t d = 0; d < head.D; ++d) data.e.set(n * head.e_row_stride + d, d == 0 ? 1 : 0);
  }
  for (std::int64_t v = 0; v < head.classes.count; ++v) {
    data.bias.set(v, 0);
    for (std::int64_t d = 0; d < head.D; ++d) data.c.set(v * head.c_row_stride + d, 0);
  }
  for (const std::int64_t first :
       {std::int64_t{0}, std::int64_t{1}, std::int64_t{700}, head.classes.count - 2}) {
    for (std::int64_t v = first; v < head.classes.count; v += v == first ? 1 : 97) {
      data.c.set(v * head.c_row_stride, 3);
    }
    // Targets among the equals and elsewhere: the target's logit takes a way of its own.
    data.set_target(0, first);
    data.set_target(1, first + 1);
    data.set_target(2, 0);
    for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
      EXPECT_EQ(out.argmax, std::vector<std::int64_t>(row_count(p), first));
    });
    for (std::int64_t v = 0; v < head.classes.count; ++v) data.c.set(v * head.c_row_stride, 0);
  }
}

// p of the target is 1 to the last bit, and still nll and the gradients keep their digits.
TEST_P(Edge, ConfidentRowsKeepTheirDigits) {
  Case c = GetParam().problem;
  head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = true;
  Data data = make_data(c);
  const Problem& p = data.problem;
  for (std::int64_t v = 0; v < classes_of(p).count; ++v) data.bias.set(v, -30);
  data.bias.set(11, 8);
  for (std::int64_t n = 0; n < row_count(p); ++n) data.set_target(n, 11);
  for_each_mode(data, GetParam().engine, [&](const Outputs& out) {
    expect_as_reference(GetParam().engine, data, out);
    for (std::int64_t n = 0; n < out.nll.count; ++n) {
      EXPECT_GT(out.nll.get(n), 0);
      EXPECT_LT(out.nll.get(n), 1e-9);
    }
  });
}

// What nobody reads may hold anything: temperatures of ignored rows (their E and upstream
// gradients are NaN in every test).
TEST_P(Edge, TemperaturesOfIgnoredRowsAreNotRead) {
  Case c = GetParam().problem;
  c.problem.rows.has_temperature = true;
  c.ignored = 0.4;
  Data data = make_data(c);
  for (std::int64_t n = 0; n < row_count(data.problem); ++n) {
    if (!data.counts(n)) data.temperature.set(n, std::nan(""));
  }
  for_each_mode(data, GetParam().engine,
                [&](const Outputs& out) { expect_as_reference(GetParam().engine, data, out); });
}

INSTANTIATE_TEST_SUITE_P(Engines, Edge,
                         testing::ValuesIn(subjects({with_bias(), with_bias_alone()})),
                         subject_name);

// 17,000 rows of 131,072 columns are 2.2e9 logits, which 32-bit offsets cannot count. A few rows
// are compared with the reference; they lie at both ends.
TEST(LargeProblem, MoreLogitsThanThirtyTwoBitsCount) {
  Case c = with_size(1, 17000, 131072, 8);
  c.problem.wanted.dc.wanted = false;
  c.ignored = 0;
  for (const std::string& engine : engine_names()) {
    SCOPED_TRACE(engine);
    if (!takes(engine, c.problem)) continue;
    const Data data = make_data(c);
    const Outputs got = run(plan_for(data.problem, engine, kModes[4]), data);
    for (const std::int64_t row : {0, 8191, 16383, 16384, 16999}) {
      SCOPED_TRACE(row);
      Data alone = make_data(with_size(1, 1, classes_of(c.problem).count, head_of(c.problem).D));
      std::memcpy(alone.c.pointer(), data.c.pointer(), data.c.buffer.bytes());
      for (std::int64_t d = 0; d < head_of(c.problem).D; ++d) {
        alone.e.set(d, data.e.get(row * head_of(c.problem).D + d));
      }
      alone.set_target(0, data.target(row));
      alone.d_nll.set(0, data.d_nll.get(row));
      const reference::Result want = truth_for(engine, alone);
      const Bounds bound = bounds(alone, want);
      EXPECT_NEAR(got.nll.get(row), want.nll[0], bound.nll[0]);
      for (std::int64_t d = 0; d < head_of(c.problem).D; ++d) {
        EXPECT_NEAR(got.de.get(row * head_of(c.problem).D + d), want.de[d], bound.de[d]);
      }
    }
  }
}

}  // namespace
}  // namespace cutloss::test
