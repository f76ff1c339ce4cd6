// The formulas of one row: running statistics, their merge, the target added at the end, and g at
// the target, against sums in double over the whole row.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/logit_math.h"

namespace cutloss::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Piece {
  double max = -kInf, sum = 0, weighted_sum = 0, zbar = 0, weight_seen = 0;
  std::int64_t argmax = 0;
};

// The statistics of columns [begin, end) without the target.
Piece piece_of(const std::vector<double>& z, std::int64_t target, std::int64_t begin,
               std::int64_t end) {
  Piece piece;
  for (std::int64_t v = begin; v < end; ++v) {
    if (v != target && z[v] > piece.max) {
      piece.max = z[v];
      piece.argmax = v;
    }
  }
  for (std::int64_t v = begin; v < end; ++v) {
    if (v == target) continue;
    piece.zbar += z[v] - (piece.max == -kInf ? 0 : piece.max);
    piece.weight_seen += 1;
  }
  if (piece.max == -kInf) return piece;
  for (std::int64_t v = begin; v < end; ++v) {
    if (v == target || z[v] == -kInf) continue;
    piece.sum += std::exp(z[v] - piece.max);
    piece.weighted_sum += std::exp(z[v] - piece.max) * (z[v] - piece.max);
  }
  return piece;
}

void merge_piece(RowState<double>& state, const Piece& piece) {
  RowState<double> other;
  other.max = piece.max;
  other.sum = piece.sum;
  other.weighted_sum = piece.weighted_sum;
  other.zbar = piece.zbar;
  other.weight_seen = piece.weight_seen;
  other.argmax = piece.argmax;
  merge(state, other);
}

RowResult<double> result_of(const std::vector<double>& z, std::int64_t target,
                            const std::vector<std::int64_t>& cuts) {
  RowState<double> state;
  std::int64_t begin = 0;
  for (const std::int64_t end : cuts) {
    merge_piece(state, piece_of(z, target, begin, end));
    begin = end;
  }
  state.target_logit = z[target];
  return close(state, target, 1.0, static_cast<std::int64_t>(z.size()));
}

std::vector<double> random_row(std::int64_t V, double size, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, size);
  std::vector<double> z(V);
  for (double& logit : z) logit = normal(random);
  return z;
}

void expect_same(const RowResult<double>& a, const RowResult<double>& b) {
  EXPECT_NEAR(a.nll, b.nll, 1e-13 * (1 + std::fabs(b.nll)));
  EXPECT_NEAR(a.lse, b.lse, 1e-13 * (1 + std::fabs(b.lse)));
  EXPECT_NEAR(a.row_max + a.log_sum, b.lse, 1e-13 * (1 + std::fabs(b.lse)));
  EXPECT_NEAR(a.entropy, b.entropy, 1e-12 * (1 + b.entropy));
  EXPECT_NEAR(a.zbar, b.zbar, 1e-13 * (1 + std::fabs(b.zbar)));
  EXPECT_EQ(a.argmax, b.argmax);
}

TEST(RowState, MergesToTheSameFromAnyPieces) {
  for (const double size : {0.01, 1.0, 30.0}) {
    const std::vector<double> z = random_row(101, size, 5);
    for (const std::int64_t target : {0, 50, 100}) {
      const RowResult<double> whole = result_of(z, target, {101});
      expect_same(result_of(z, target, {1, 2, 3, 101}), whole);
      expect_same(result_of(z, target, {50, 51, 101}), whole);  // the target alone in a piece
      expect_same(result_of(z, target, {33, 66, 101}), whole);
      expect_same(result_of(z, target, {101, 101, 101}), whole);  // empty pieces
    }
  }
}

TEST(RowState, MergeIsAssociativeButForRounding) {
  const std::vector<double> z = random_row(90, 5, 8);
  const Piece a = piece_of(z, -1, 0, 30), b = piece_of(z, -1, 30, 60), c = piece_of(z, -1, 60, 90);
  RowState<double> left;  // (a b) c
  for (const Piece& piece : {a, b, c}) merge_piece(left, piece);
  RowState<double> right, tail;  // a (b c)
  merge_piece(tail, b);
  merge_piece(tail, c);
  merge_piece(right, a);
  merge(right, tail);
  EXPECT_EQ(left.max, right.max);
  EXPECT_EQ(left.argmax, right.argmax);
  EXPECT_NEAR(left.sum, right.sum, 1e-14 * left.sum);
  EXPECT_NEAR(left.weighted_sum, right.weighted_sum, 1e-13 * std::fabs(left.weighted_sum));
}

// The state of columns [begin, end), with weights; NaNs go where the engines let them go.
RowState<double> state_of(const std::vector<double>& z, const std::vector<double>& weight,
                          std::int64_t target, std::int64_t begin, std::int64_t end) {
  RowState<double> state;
  for (std::int64_t v = begin; v < end; ++v) {
    RowState<double> one;
    if (v == target) {
      one.target_logit = z[v];
    } else {
      const bool nothing = z[v] == -kInf;
      one.max = z[v];
      one.sum = nothing ? 0 : std::exp(z[v] - z[v]);
      one.zbar = weight[v] == 0 ? 0 : weight[v] * (nothing ? z[v] : z[v] - z[v]);
      one.weight_seen = weight[v];
      one.argmax = v;
    }
    merge(state, one);
  }
  return state;
}

// Every way to cut the row in 2 to 5 parts, empty ones among them, joined forwards and backwards.
template <class Expect>
void for_all_splits(const std::vector<double>& z, const std::vector<double>& weight,
                    std::int64_t target, Expect expect) {
  const auto V = static_cast<std::int64_t>(z.size());
  std::vector<std::int64_t> cuts = {0, 0, 0, 0};
  const auto seen = [&] {
    std::vector<RowState<double>> parts;
    std::int64_t begin = 0;
    for (const std::int64_t end : {cuts[0], cuts[1], cuts[2], cuts[3], V}) {
      parts.push_back(state_of(z, weight, target, begin, end));
      begin = end;
    }
    RowState<double> forwards, backwards;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      merge(forwards, parts[i]);
      merge(backwards, parts[parts.size() - 1 - i]);
    }
    expect(forwards);
    expect(backwards);
  };
  for (cuts[0] = 0; cuts[0] <= V; ++cuts[0]) {
    for (cuts[1] = cuts[0]; cuts[1] <= V; ++cuts[1]) {
      for (cuts[2] = cuts[1]; cuts[2] <= V; ++cuts[2]) {
        for (cuts[3] = cuts[2]; cuts[3] <= V; ++cuts[3]) seen();
      }
    }
  }
}

TEST(RowState, MergesWholeInEveryOrder) {
  for (const double offset : {0.0, 1e4}) {
    std::vector<double> z = {3, -1, -kInf, 5, 2, 5, 0.5, 5, -2};  // of the largest, 3 is the first
    for (double& logit : z) logit += offset;
    for (const std::vector<double>& weight :
         {std::vector<double>(9, 1.0), std::vector<double>{2, 0, 0, 1, 0.5, 3, 0, 1, 4}}) {
      if (weight[2] == 1) z[2] = offset - 20;  // a weight beside -inf makes zbar -inf
      for (const std::int64_t target : {std::int64_t{4}, std::int64_t{7}, std::int64_t{3}}) {
        double sum = 0, weighted = 0, zbar = 0, weights = 0;
        for (std::int64_t v = 0; v < 9; ++v) {
          if (v == target) continue;
          weights += weight[v];
          if (z[v] == -kInf) continue;
          const double t = z[v] - (5 + offset);
          sum += std::exp(t);
          weighted += std::exp(t) * t;
          zbar += weight[v] * t;
        }
        for_all_splits(z, weight, target, [&](const RowState<double>& state) {
          ASSERT_EQ(state.max, 5 + offset);
          ASSERT_EQ(state.argmax, target == 3 ? 5 : 3);
          ASSERT_EQ(state.target_logit, z[target]);
          ASSERT_NEAR(state.sum, sum, 1e-14 * sum);
          ASSERT_NEAR(state.weighted_sum, weighted, 1e-13 * std::fabs(weighted));
          ASSERT_NEAR(state.zbar, zbar, 1e-13 * std::fabs(zbar));
          ASSERT_NEAR(state.weight_seen, weights, 1e-14 * weights);
        });
      }
    }
  }
}

TEST(RowState, MergesInfinitiesAndNaNsInEveryOrder) {
  const std::vector<double> ones(5, 1.0), none(5, 0.0);
  const std::vector<double> empty(5, -kInf);
  for_all_splits(empty, none, 2, [](const RowState<double>& state) {
    ASSERT_EQ(state.max, -kInf);
    ASSERT_EQ(state.sum, 0);
    ASSERT_EQ(state.zbar, 0);
    ASSERT_EQ(state.target_logit, -kInf);
  });
  std::vector<double> z = {1, 2, -kInf, 0, 1};
  for_all_splits(z, ones, 0, [](const RowState<double>& state) {
    ASSERT_EQ(state.zbar, -kInf);
    ASSERT_EQ(state.argmax, 1);
    ASSERT_NEAR(state.sum, 1 + std::exp(-2) + std::exp(-1), 1e-15);
  });
  z[3] = std::nan("");
  for_all_splits(z, ones, 0, [](const RowState<double>& state) {
    ASSERT_TRUE(std::isnan(state.sum));
    ASSERT_EQ(state.target_logit, 1);
  });
  for_all_splits(z, ones, 3, [](const RowState<double>& state) {  // there, and NaN
    ASSERT_TRUE(std::isnan(state.target_logit));
    ASSERT_TRUE(std::isfinite(state.sum));
  });
}

TEST(RowState, CloseAgreesWithTheSumsOverTheRow) {
  for (const double size : {0.1, 1.0, 10.0}) {
    const std::vector<double> z = random_row(64, size, 11);
    for (std::int64_t target = 0; target < 64; target += 9) {
      const RowResult<double> row = result_of(z, target, {20, 64});
      double sum = 0, mean = 0;
      for (const double logit : z) sum += std::exp(logit);
      double entropy = 0;
      for (const double logit : z) {
        const double log_p = logit - std::log(sum);
        entropy -= std::exp(log_p) * log_p;
        mean += logit / 64;
      }
      EXPECT_NEAR(row.lse, std::log(sum), 1e-12);
      EXPECT_NEAR(row.nll, std::log(sum) - z[target], 1e-12);
      EXPECT_NEAR(row.entropy, entropy, 1e-12);
      EXPECT_NEAR(row.zbar, mean, 1e-13);
    }
  }
}

TEST(RowState, ColumnsAtMinusInfinityChangeNothing) {
  std::vector<double> z = random_row(40, 2, 3);
  const RowResult<double> without = result_of(z, 5, {40});
  z.insert(z.begin(), 10, -kInf);
  z.insert(z.end(), 10, -kInf);
  const RowResult<double> with = result_of(z, 15, {5, 10, 50, 55, 60});
  EXPECT_EQ(with.nll, without.nll);
  EXPECT_EQ(with.lse, without.lse);
  EXPECT_EQ(with.entropy, without.entropy);
  EXPECT_EQ(with.argmax, without.argmax + 10);
}

TEST(RowState, ATargetAloneHasNoLoss) {
  const RowResult<double> row = result_of({3.5}, 0, {1});
  EXPECT_EQ(row.nll, 0);
  EXPECT_EQ(row.lse, 3.5);
  EXPECT_EQ(row.entropy, 0);
  EXPECT_EQ(row.argmax, 0);
}

TEST(RowState, ConfidentRowsKeepTheirDigits) {
  for (const double lead : {20.0, 40.0, 200.0, 700.0}) {
    const RowResult<double> row = result_of({0, lead, 0}, 1, {3});
    EXPECT_NEAR(row.nll, std::log1p(2 * std::exp(-lead)), 1e-14 * row.nll);
    EXPECT_GT(row.nll, 0);
  }
}

TEST(RowState, LargeOffsetsCancel) {
  std::vector<double> z = random_row(30, 2, 6);
  for (double& logit : z) logit = std::ldexp(std::nearbyint(std::ldexp(logit, 20)), -20);
  const RowResult<double> near = result_of(z, 4, {30});
  for (double& logit : z) logit += 16384;  // exact
  const RowResult<double> far = result_of(z, 4, {30});
  EXPECT_EQ(far.nll, near.nll);
  EXPECT_EQ(far.entropy, near.entropy);
  EXPECT_EQ(far.log_sum, near.log_sum);
  EXPECT_EQ(far.row_max, near.row_max + 16384);
}

TEST(RowState, RowsWithoutASoftmaxAreNaN) {
  const double nan = std::nan("");
  const std::vector<std::pair<std::vector<double>, std::int64_t>> rows = {
      {{-kInf, -kInf, -kInf}, 1}, {{0, kInf, 0}, 1}, {{0, nan, 0}, 1}, {{-kInf}, 0}};
  for (const auto& [z, target] : rows) {
    const RowResult<double> row = result_of(z, target, {static_cast<std::int64_t>(z.size())});
    EXPECT_TRUE(std::isnan(row.nll));
    EXPECT_TRUE(std::isnan(row.log_sum));
    EXPECT_TRUE(std::isnan(row.entropy));
    EXPECT_FALSE(std::isfinite(row.lse));
  }
}

TEST(RowState, AnUnlikelyTargetAtMinusInfinity) {
  const RowResult<double> row = result_of({1, -kInf, 1}, 1, {3});
  EXPECT_EQ(row.nll, kInf);
  EXPECT_NEAR(row.lse, 1 + std::log(2), 1e-15);
  EXPECT_NEAR(row.entropy, std::log(2), 1e-15);
}

// g at the target is the derivative of the row's outputs with respect to the target's logit.
TEST(TargetGradient, IsTheDerivativeOfTheOutputs) {
  std::vector<double> z = random_row(12, 1.5, 21);
  const std::int64_t target = 7;
  const double d_nll = 0.7, d_lse = -0.3, d_entropy = 0.9, d_zbar = 1.3, weight = 1;
  const auto loss = [&](double logit) {
    z[target] = logit;
    const RowResult<double> row = result_of(z, target, {12});
    return d_nll * row.nll + d_lse * row.lse + d_entropy * row.entropy + d_zbar * row.zbar;
  };
  const double logit = z[target], step = 1e-5;
  const double want = (loss(logit + step) - loss(logit - step)) / (2 * step);
  z[target] = logit;
  const RowResult<double> row = result_of(z, target, {12});
  RowCoefficients<double> k{};
  k.row_max = row.row_max;
  k.log_sum = row.log_sum;
  k.a = d_nll + d_lse;
  k.d_entropy = d_entropy;
  k.entropy = row.entropy;
  k.zbar = d_zbar / 12;
  k.inv_temperature = 1;
  EXPECT_NEAR(target_gradient(k, row.nll, d_nll, d_lse, weight), want, 1e-9);
}

}  // namespace
}  // namespace cutloss::test
