// From targets to the loss: its coefficients on every device, the weighted sum on every engine.
#include <cmath>

#include "check.h"

namespace cutloss::test {
namespace {

// --- coefficients -----------------------------------------------------------------------------

std::vector<Device> devices() {
  std::vector<Device> all = {Device::cpu};
  for (const std::string& engine : engine_names()) {
    if (!runs_on_gpu(engine)) continue;
    all.push_back(Device::cuda);
    break;
  }
  return all;
}

struct Weights {
  Array token, classes;  // count 0 where not given
};

Weights random_weights(const Data& data, bool token, bool classes) {
  const Problem& p = data.problem;
  const DType stat = reference::stat_type(p);
  std::mt19937_64 random(3);
  Weights weights;
  if (token) {
    weights.token = detail::random_array(stat, p.rows.sequences * p.rows.length, 0.5, 2, random);
    for (std::int64_t i = 0; i < weights.token.count; ++i) {
      if (data.target(i) == p.rows.ignore_index) weights.token.set(i, std::nan(""));  // not read
    }
  }
  if (classes) weights.classes = detail::random_array(stat, classes_of(p).count, 0.5, 2, random);
  return weights;
}

struct Terms {
  Array nll, lse, lse_squared, zbar;
  Buffer undefined{1};
  bool is_undefined() const { return undefined.data()[0] == std::byte{1}; }
};

Weighting weighting_of(const Weights& weights, Device device, bool mean, double smoothing,
                       double z_loss) {
  Weighting w;
  w.mean = mean;
  w.label_smoothing = smoothing;
  w.z_loss = z_loss;
  w.token_weight = weights.token.on(device);
  w.class_weight = weights.classes.on(device);
  return w;
}

Terms make_terms(const Data& data, const Weighting& w, Device device) {
  Problem p = data.problem;
  p.device = device;
  p.upstream.when = Upstream::at_forward;
  const DType stat = reference::stat_type(p);
  const std::int64_t N = row_count(p);
  Terms terms;
  terms.nll = Array(stat, N);
  if (w.label_smoothing > 0) terms.lse = Array(stat, N);
  if (w.label_smoothing > 0) terms.zbar = Array(stat, N);
  if (w.z_loss > 0) terms.lse_squared = Array(stat, N);
  LossTerms out;
  out.nll = terms.nll.on(device);
  out.lse = terms.lse.on(device);
  out.lse_squared = terms.lse_squared.on(device);
  out.zbar = terms.zbar.on(device);
  out.undefined = reinterpret_cast<bool*>(terms.undefined.on(device));
  loss_terms(loss_rows(p), w, data.targets.on(device), out, nullptr);
  for (Array* array : {&terms.nll, &terms.lse, &terms.lse_squared, &terms.zbar}) {
    array->buffer.fetch();
    EXPECT_TRUE(array->buffer.guards_intact());
  }
  terms.undefined.fetch();
  EXPECT_TRUE(terms.undefined.guards_intact());
  return terms;
}

// The formula of cutloss.h, in fp64.
void expect_terms(const Data& data, const Weights& weights, const Weighting& w,
                  const Terms& terms) {
  const Problem& p = data.problem;
  const std::int64_t N = row_count(p);
  std::vector<double> token(N), weighted(N);
  double token_total = 0, total = 0, classes = 0;
  for (std::int64_t v = 0; v < classes_of(p).count; ++v) {
    classes += weights.classes.count > 0 ? weights.classes.get(v) : 1;
  }
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t i = reference::position_of_row(p, n) + p.rows.shift;
    const std::int64_t target = data.target(i);
    if (target == p.rows.ignore_index) continue;
    token[n] = weights.token.count > 0 ? weights.token.get(i) : 1;
    const std::int64_t nearest = std::clamp<std::int64_t>(target, 0, classes_of(p).count - 1);
    weighted[n] = token[n] * (weights.classes.count > 0 ? weights.classes.get(nearest) : 1);
    token_total += token[n];
    total += weighted[n];
  }
  const bool undefined = w.mean && total == 0;
  EXPECT_EQ(terms.is_undefined(), undefined);
  if (!w.mean || undefined) total = token_total = 1;
  const double eps = w.label_smoothing;
  // Sums are made in fp64, here and on a device in orders of their own.
  const double unit =
      8 * reference::unit_roundoff(reference::stat_type(p)) +
      static_cast<double>(N + classes_of(p).count) * reference::unit_roundoff(DType::f64);
  const auto near = [&](const Array& got, std::int64_t n, double want) {
    if (got.count == 0) return;
    EXPECT_NEAR(got.get(n), want, unit * std::fabs(want)) << "row " << n;
  };
  for (std::int64_t n = 0; n < N; ++n) {
    near(terms.nll, n, weighted[n] / total * (1 - eps));
    near(terms.lse, n, token[n] / total * eps * classes / static_cast<double>(classes_of(p).count));
    near(terms.zbar, n, -token[n] / total * eps);
    near(terms.lse_squared, n, token[n] / token_total * w.z_loss);
  }
}

std::vector<Case> term_cases() {
  std::vector<Case> cases = {with_size(1, 1, 1, 1), with_size(3, 11, 97, 2, 2),
                             with_size(1, 1025, 1031, 1), with_size(2, 3000, 7, 1, 1)};
  const std::size_t sizes = cases.size();
  for (std::size_t i = 0; i < sizes; ++i) {
    Case other = cases[i];
    other.problem.rows.target_type = IndexType::i32;
    other.problem.rows.ignore_index = 0;
    cases.push_back(other);
    other.ignored = 1;
    cases.push_back(other);
    set_types(other.problem, kTypes[2]);  // fp64
    other.ignored = 0.2;
    cases.push_back(other);
  }
  cases.push_back(with_size(0, 5, 3, 1));
  return cases;
}

TEST(LossTerms, AreTheFormula) {
  for (const Device device : devices()) {
    for (const Case& c : term_cases()) {
      Data data = make_data(c);
      if (row_count(data.problem) > 4)
        data.set_target(3, classes_of(data.problem).count + 5);  // of the last class
      for (const int options : {0, 1, 2, 3, 4, 5, 6, 7}) {
        const Weights weights = random_weights(data, options & 1, options & 2);
        for (const double smoothing : {0.0, 0.25, 1.0}) {
          const double z_loss = options & 4 ? 1e-3 : 0.0;
          for (const bool mean : {false, true}) {
            SCOPED_TRACE(c.name + " options " + std::to_string(options) + " smoothing " +
                         std::to_string(smoothing) + (mean ? " mean" : " sum"));
            const Weighting w = weighting_of(weights, device, mean, smoothing, z_loss);
            expect_terms(data, weights, w, make_terms(data, w, device));
          }
        }
      }
    }
  }
}

// Weights that add up to nothing, though rows count: coefficients of 0.
TEST(LossTerms, OfAnUndefinedMeanAreZero) {
  const Data data = make_data(with_size(1, 300, 7, 1));
  for (const Device device : devices()) {
    Weights weights = random_weights(data, false, true);
    for (std::int64_t v = 0; v < weights.classes.count; ++v) weights.classes.set(v, 0);
    const Terms terms = make_terms(data, weighting_of(weights, device, true, 0.5, 1), device);
    EXPECT_TRUE(terms.is_undefined());
    for (const Array* array : {&terms.nll, &terms.lse, &terms.lse_squared, &terms.zbar}) {
      for (std::int64_t n = 0; n < array->count; ++n) ASSERT_EQ(array->get(n), 0);
    }
  }
}

// A shift of the length or more leaves no rows, of which the sum is defined and the mean is not.
TEST(LossTerms, OfNoRows) {
  for (const std::int64_t shift : {3, 4}) {
    const Data data = make_data(with_size(2, 3, 7, 1, shift));
    ASSERT_EQ(row_count(data.problem), 0);
    for (const Device device : devices()) {
      const Weights weights = random_weights(data, true, true);
      for (const bool mean : {false, true}) {
        const Weighting w = weighting_of(weights, device, mean, 0.5, 1);
        EXPECT_EQ(make_terms(data, w, device).is_undefined(), mean);
      }
    }
  }
}

TEST(LossTerms, RefuseWhatDoesNotFit) {
  Data data = make_data(with_size(1, 4, 7, 1));
  data.problem.upstream.when = Upstream::at_forward;
  float row[4];
  bool undefined;
  const auto expect_refusal = [&](const Weighting& w, const LossTerms& terms, const char* part) {
    try {
      loss_terms(loss_rows(data.problem), w, data.targets.data(), terms, nullptr);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_value);
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  LossTerms plain;
  plain.nll = row;
  plain.undefined = &undefined;
  const auto with = [](double smoothing, double z_loss) {
    Weighting w;
    w.label_smoothing = smoothing;
    w.z_loss = z_loss;
    return w;
  };
  expect_refusal(with(1.5, 0), plain, "label_smoothing must be in [0, 1], got 1.5");
  expect_refusal(with(0, -1), plain, "z_loss must be finite and >= 0, got -1");
  expect_refusal(with(0.5, 0), plain, "terms.lse is null, but label_smoothing is 0.5");
  expect_refusal(with(0, 2), plain, "terms.lse_squared is null, but z_loss is 2");
  LossTerms more = plain;
  more.zbar = row;
  expect_refusal(with(0, 0), more, "terms.zbar is given, but label_smoothing is 0");
  LossTerms less = plain;
  less.undefined = nullptr;
  expect_refusal(with(0, 0), less, "terms.undefined is null");
}

// --- the sum ----------------------------------------------------------------------------------

std::vector<Case> cases() {
  Case plain = with_size(1, 391, 1043, 40);
  plain.name = "plain";
  Case everything = with_size(2, 67, 1043, 24, 1);
  add_everything(everything);
  everything.name = "everything";
  return {plain, everything};
}

struct Loss {
  Outputs out;
  double value;
};

Loss run_loss(const Subject& subject, const Data& data, const Buffer* undefined) {
  const Plan plan = plan_for(data.problem, subject.engine, kModes[4]);
  Loss loss{outputs_for(plan.problem), 0};
  Scratch scratch(plan);
  Array number(reference::stat_type(data.problem), 1);
  const Device device = plan.problem.device;
  Args args = args_for(data, loss.out, scratch, /*forward=*/true);
  // With it d_lse and d_zbar would be label smoothing's, not any numbers.
  args.rows.zbar_centred = nullptr;
  forward(plan, args);
  weighted_loss(
      plan, args, number.on(device),
      undefined == nullptr ? nullptr : reinterpret_cast<const bool*>(undefined->on(device)));
  loss.out.fetch();
  number.buffer.fetch();
  EXPECT_TRUE(number.buffer.guards_intact());
  loss.value = number.get(0);
  return loss;
}

using WeightedLoss = EverySubject;

TEST_P(WeightedLoss, IsTheRowsSum) {
  Case c = GetParam().problem;
  c.lse_gradient = true;
  const Data data = make_data(c);
  const DType stat = reference::stat_type(data.problem);
  const Loss loss = run_loss(GetParam(), data, nullptr);
  double want = 0, size = 0;
  const auto add = [&](const Array& coefficient, std::int64_t n, double value) {
    if (coefficient.count == 0) return;
    want += coefficient.get(n) * value;
    size += std::fabs(coefficient.get(n) * value);
  };
  for (std::int64_t n = 0; n < row_count(data.problem); ++n) {
    if (!data.counts(n)) continue;
    const double lse = loss.out.lse.get(n);
    add(data.d_nll, n, loss.out.nll.get(n));
    add(data.d_lse, n, lse);
    add(data.d_lse_squared, n, lse * lse);
    add(data.d_zbar, n, data.problem.wanted.zbar ? loss.out.zbar.get(n) : 0);
  }
  const double sums = gamma(reference::unit_roundoff(DType::f64), row_count(data.problem));
  EXPECT_NEAR(loss.value, want, (2 * reference::unit_roundoff(stat) + sums) * size);
}

TEST_P(WeightedLoss, IsNaNWhereItIsUndefined) {
  const Data data = make_data(GetParam().problem);
  Buffer undefined(1);
  undefined.data()[0] = std::byte{0};
  const double defined = run_loss(GetParam(), data, &undefined).value;
  EXPECT_EQ(defined, run_loss(GetParam(), data, nullptr).value);
  undefined.data()[0] = std::byte{1};
  EXPECT_TRUE(std::isnan(run_loss(GetParam(), data, &undefined).value));
}

INSTANTIATE_TEST_SUITE_P(Engines, WeightedLoss, testing::ValuesIn(subjects(cases())), subject_name);

// What the rows are to hold for the coefficients that are given.
TEST_P(WeightedLoss, NamesTheRowsThatAreMissing) {
  Case c = GetParam().problem;
  c.lse_gradient = c.problem.wanted.zbar = c.problem.upstream.zbar = true;
  const Data data = make_data(c);
  const Plan plan = plan_for(data.problem, GetParam().engine, kModes[4]);
  Outputs out = outputs_for(plan.problem);
  Scratch scratch(plan);
  Array number(reference::stat_type(data.problem), 1);
  const Args args = args_for(data, out, scratch, /*forward=*/true);
  const std::pair<const char*, void (*)(Args&)> cases[] = {
      {"rows.lse is null", [](Args& a) { a.rows.lse = a.rows.zbar_centred = nullptr; }},
      {"rows.log_sum is null", [](Args& a) { a.rows.log_sum = nullptr; }},
      {"rows.zbar and rows.zbar_centred are null",
       [](Args& a) { a.rows.zbar = a.rows.zbar_centred = nullptr; }}};
  for (const auto& [message, spoil] : cases) {
    Args spoilt = args;
    spoil(spoilt);
    try {
      weighted_loss(plan, spoilt, number.on(plan.problem.device));
      ADD_FAILURE() << "not refused: " << message;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  }
}

// The CPU counts for itself.
using WeightedLossOnGpu = EverySubject;
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(WeightedLossOnGpu);

TEST_P(WeightedLossOnGpu, IsNaNWhereNumValidIsWrong) {
  Data data = make_data(GetParam().problem);
  std::int64_t valid = 0;
  for (std::int64_t n = 0; n < row_count(data.problem); ++n) valid += data.counts(n) ? 1 : 0;
  data.problem.rows.num_valid = valid + 1;
  EXPECT_TRUE(std::isnan(run_loss(GetParam(), data, nullptr).value));
  data.problem.rows.num_valid = valid;
  EXPECT_FALSE(std::isnan(run_loss(GetParam(), data, nullptr).value));
}

std::vector<Subject> subjects_on_gpu() {
  std::vector<Subject> all = subjects(cases());
  std::erase_if(all, [](const Subject& subject) { return !runs_on_gpu(subject.engine); });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Engines, WeightedLossOnGpu, testing::ValuesIn(subjects_on_gpu()),
                         subject_name);

}  // namespace
}  // namespace cutloss::test
