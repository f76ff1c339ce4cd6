// Losses over logits that exist, on every device, against the reference in fp64: sizes, options,
// layouts, the gradient in memory of its own and in the logits' place.
#include "cutloss/logits.h"

#include "check.h"
#include "core/text.h"

namespace cutloss::test {
namespace {

std::vector<Device> devices() {
  for (const std::string& engine : engine_names()) {
    if (runs_on_gpu(engine)) return {Device::cpu, Device::cuda};
  }
  return {Device::cpu};
}

// How the logits, and a gradient beside them, lie in memory.
struct Layout {
  const char* name;
  std::int64_t offset, extra_row, extra_sequence;
};
constexpr Layout kLayouts[] = {{"packed", 0, 0, 0}, {"odd", 3, 5, 7}, {"wide", 8, 16, 24}};

// The elements from the first to the last row, `offset` beyond the beginning of an array.
struct Logits3d {
  Array array;
  std::int64_t offset = 0;
  std::int64_t row_stride = 0, sequence_stride = 0;

  Logits3d() = default;
  Logits3d(const Problem& p, DType type, const Layout& layout)
      : offset(layout.offset),
        row_stride(classes_of(p).count + layout.extra_row),
        sequence_stride(p.rows.length * row_stride + layout.extra_sequence) {
    array = Array(type, offset + p.rows.sequences * sequence_stride);
  }
  std::int64_t at(const Problem& p, std::int64_t position) const {
    return offset + position / p.rows.length * sequence_stride +
           position % p.rows.length * row_stride;
  }
  void* on(Device device) const {
    return static_cast<std::byte*>(array.on(device)) + offset * reference::bytes_of(array.type);
  }
};

struct LogitsData {
  Data data;  // targets, temperatures, weights, upstream gradients
  Problem problem;
  Layout layout;
  Logits3d logits;
  reference::Result want;
  Bounds bound;
};

// The problem of the logits that `p` would make.
Problem problem_of(const Problem& p, DType type) {
  Problem q;
  q.rows = p.rows;
  Logits logits;
  logits.classes = classes_of(p);
  logits.type = type;
  q.source = logits;
  q.transform = p.transform;
  q.wanted.entropy = p.wanted.entropy;
  q.wanted.zbar = p.wanted.zbar;
  q.wanted.argmax = p.wanted.argmax;
  q.wanted.dlogits.wanted = true;
  q.upstream = p.upstream;
  q.upstream.when = Upstream::at_forward;
  q.has_class_weight = p.has_class_weight;
  return q;
}

// Logits are the products of a case's E and C. Those of rows that do not count, and what lies
// between rows, are NaN: reading them would show.
LogitsData make_logits(Case c, DType type, const Layout& layout) {
  head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = false;
  const DType stat = type == DType::f64 ? DType::f64 : DType::f32;
  set_types(c.problem, {"", stat, stat, stat, stat});
  LogitsData made;
  Data& data = made.data;
  data = make_data(c);
  Problem& p = data.problem;
  Head& head = head_of(p);
  made.layout = layout;
  made.logits = Logits3d(p, type, layout);
  for (std::int64_t n = 0; n < row_count(p); ++n) {
    if (!data.counts(n)) continue;
    const std::int64_t position = reference::position_of_row(p, n);
    const std::int64_t e = data.e_offset(position), to = made.logits.at(p, position);
    for (std::int64_t v = 0; v < head.classes.count; ++v) {
      double z = 0;
      for (std::int64_t d = 0; d < head.D; ++d) {
        z += data.e.get(e + d) * data.c.get(v * head.c_row_stride + d);
      }
      EXPECT_TRUE(std::isfinite(z));
      made.logits.array.set(to + v, z);
    }
  }
  made.problem = problem_of(p, type);
  logits_of(made.problem).row_stride = made.logits.row_stride;
  logits_of(made.problem).sequence_stride = made.logits.sequence_stride;
  head.e_type = type;
  return made;
}

void evaluate(LogitsData& made) {
  Inputs in = made.data.inputs();
  in.e = made.logits.on(Device::cpu);
  made.want = reference::evaluate_logits(made.problem, in, made.data.upstream64());
  made.bound = bounds(made.data, made.want);
}

// The gradient with respect to the logits, and how far off it may be: (N, V).
std::vector<double> gradient_of(const LogitsData& made, std::vector<double>& allowed) {
  const reference::Result& r = made.want;
  const Problem& p = made.data.problem;
  const Head& head = head_of(p);
  const double u = detail::rounding_units(p, r.compute_type).accumulator;
  const double scale = std::fabs(p.transform.logit_scale);
  std::vector<double> want(r.N * r.V);
  allowed.assign(r.N * r.V, 0);
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    for (std::int64_t v = 0; v < r.V; ++v) {
      const std::int64_t i = n * r.V + v;
      want[i] = r.g[i] * r.slope[i] * p.transform.logit_scale;
      const double cap_error = detail::slope_bound(made.data, r, 0, n, v);  // the logits are given
      const double exact = detail::g_bound(made.data, r, made.bound, n, v) * r.slope[i] +
                           std::fabs(r.g[i]) * (cap_error + 4 * u * r.slope[i]);
      allowed[i] = scale * exact +
                   1.01 * reference::unit_roundoff(head.e_type) * std::fabs(want[i]) +
                   std::max(reference::smallest(head.e_type), kUnderflow);
    }
  }
  return want;
}

enum class Way { forward_then_backward, at_once };

struct Result {
  Outputs rows;
  Logits3d gradient;
};

// `in_place`: the gradient takes the place of a copy of the logits.
Result run(const LogitsData& made, Device device, Way way, bool in_place, const Layout& layout,
           int blocks_per_row = 0) {
  const Problem& p = made.data.problem;
  Problem rows_only = p;
  rows_only.wanted.de.wanted = rows_only.wanted.dc.wanted = false;
  Result result{outputs_for(rows_only), {}};
  Logits3d copy(p, head_of(p).e_type, made.layout);
  std::memcpy(copy.array.pointer(), made.logits.array.pointer(), copy.array.buffer.bytes());
  result.gradient = Logits3d(p, head_of(p).e_type, layout);
  Logits3d& gradient = in_place ? copy : result.gradient;

  Problem problem = made.problem;
  problem.device = device;
  logits_of(problem).blocks_per_row = blocks_per_row;
  logits_of(problem).overwrite = in_place;
  problem.wanted.dlogits_row_stride = gradient.row_stride;
  problem.wanted.dlogits_sequence_stride = gradient.sequence_stride;
  const Inputs in = made.data.inputs(device);
  LogitsArgs args;
  args.logits = copy.on(device);
  args.targets = in.targets;
  args.temperature = in.temperature;
  args.class_weight = in.class_weight;
  args.rows = result.rows.rows(device);
  args.upstream = made.data.upstream(device);
  args.gradient = gradient.on(device);
  if (way == Way::at_once) {
    forward_backward(problem, args);
  } else {
    forward(problem, args);
    backward(problem, args);
  }
  result.rows.fetch();
  gradient.array.buffer.fetch();
  EXPECT_TRUE(result.rows.guards_intact() && gradient.array.buffer.guards_intact());
  if (in_place) result.gradient = std::move(copy);
  return result;
}

std::vector<double> rows_of(const LogitsData& made, const Logits3d& gradient) {
  const Problem& p = made.data.problem;
  std::vector<double> values;
  for (std::int64_t n = 0; n < row_count(p); ++n) {
    const std::int64_t at = gradient.at(p, reference::position_of_row(p, n));
    for (std::int64_t v = 0; v < classes_of(p).count; ++v) {
      values.push_back(gradient.array.get(at + v));
    }
  }
  return values;
}

// Zeros where nothing is predicted, and what lay between the rows as it was: NaN.
void expect_the_rest_alone(const LogitsData& made, const Logits3d& gradient) {
  const Problem& p = made.data.problem;
  std::vector<bool> seen(gradient.array.count, false);
  for (std::int64_t position = 0; position < p.rows.sequences * p.rows.length; ++position) {
    const std::int64_t at = gradient.at(p, position);
    std::fill_n(seen.begin() + at, classes_of(p).count, true);
    if (position % p.rows.length < p.rows.length - p.rows.shift) continue;
    for (std::int64_t v = 0; v < classes_of(p).count; ++v) ASSERT_EQ(gradient.array.get(at + v), 0);
  }
  for (std::int64_t i = 0; i < gradient.array.count; ++i) {
    if (seen[i]) continue;
    ASSERT_TRUE(std::isnan(gradient.array.get(i))) << "element " << i;
  }
}

void expect_accurate(const LogitsData& made, const Result& got) {
  const auto& [want, bound] = std::tie(made.want, made.bound);
  const Outputs& rows = got.rows;
  const Problem& p = made.data.problem;
  const auto check = [&](const char* what, const Array& array, const std::vector<double>& expected,
                         const std::vector<double>& allowed) {
    EXPECT_EQ(outside(what, array.values(), expected, allowed), "");
  };
  check("nll", rows.nll, want.nll, bound.nll);
  check("lse", rows.lse, want.lse, bound.lse);
  for (std::int64_t n = 0; n < want.N; ++n) EXPECT_GE(rows.nll.get(n), 0) << "row " << n;
  if (p.wanted.entropy) check("entropy", rows.entropy, want.entropy, bound.entropy);
  if (p.wanted.zbar) {
    check("zbar", rows.zbar, want.zbar, bound.zbar);
    check("zbar_centred", rows.zbar_centred, want.zbar_centred, bound.zbar_centred);
  }
  if (p.wanted.argmax) {
    EXPECT_EQ(wrong_argmax(rows.argmax, want, bound), "");
  }
  std::vector<double> allowed;
  const std::vector<double> g = gradient_of(made, allowed);
  EXPECT_EQ(outside("gradient", rows_of(made, got.gradient), g, allowed), "");
  expect_the_rest_alone(made, got.gradient);
}

// Every way to the gradient; all have the same bits where the logits lie alike.
// Large ones are seen with a gradient that lies as they do.
void expect_accurate_everywhere(const Case& c, DType type, const Layout& layout) {
  LogitsData made = make_logits(c, type, layout);
  evaluate(made);
  for (const Device device : devices()) {
    SCOPED_TRACE(device == Device::cuda ? "cuda" : "cpu");
    const Result first = run(made, device, Way::at_once, false, layout);
    expect_accurate(made, first);
    const std::vector<double> gradient = rows_of(made, first.gradient);
    for (const Way way : {Way::at_once, Way::forward_then_backward}) {
      for (const bool in_place : {false, true}) {
        for (const Layout& of_gradient : kLayouts) {
          if (gradient.size() > 100000 && &of_gradient != &layout) continue;
          const Result other = run(made, device, way, in_place, of_gradient);
          EXPECT_EQ(other.rows.first_difference(first.rows), "");
          if (made.problem.wanted.argmax) {  // backward has another kernel: it needs no argmax
            expect_accurate(made, other);
          } else {
            EXPECT_EQ(rows_of(made, other.gradient), gradient) << in_place << of_gradient.name;
          }
          expect_the_rest_alone(made, other.gradient);
          if (in_place) break;  // where it lies is settled
        }
      }
    }
  }
}

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

TEST(GivenLogits, Sizes) {
  std::vector<Case> cases = size_cases();
  cases.push_back(with_size(1, 3, 2049, 3));
  cases.push_back(with_size(2, 2, 4097, 2, 1));
  // No rows, and all of the gradient is written: zeros.
  cases.push_back(with_size(4, 1, 7, 2, 1));
  cases.push_back(with_size(2, 3, 4097, 2, 5));
  for (const Case& c : cases) {
    for (const DType type : kDTypes) {
      SCOPED_TRACE(text(c.name, " ", name(type)));
      expect_accurate_everywhere(c, type, kLayouts[0]);
    }
  }
}

TEST(GivenLogits, Options) {
  for (const Option& option : kOptions) {
    Case c = with_size(3, 11, 97, 8, 2);
    option.apply(c);
    for (const DType type : kDTypes) {
      for (const Layout& layout : kLayouts) {
        SCOPED_TRACE(text(option.name, " ", name(type), " ", layout.name));
        expect_accurate_everywhere(c, type, layout);
      }
    }
  }
}

TEST(GivenLogits, KindsOfLogits) {
  for (const LogitKind kind :
       {LogitKind::random, LogitKind::peaked, LogitKind::flat, LogitKind::offset}) {
    for (const bool all : {false, true}) {
      Case c = with_size(1, 37, 211, 16);
      if (all) add_everything(c);
      c.logits = kind;
      for (const DType type : kDTypes) {
        SCOPED_TRACE(text(static_cast<int>(kind), " ", all, " ", name(type)));
        expect_accurate_everywhere(c, type, kLayouts[1]);
      }
    }
  }
}

// Where the softcap has flattened every logit, g is of the size of its slopes, and so are the
// bounds.
TEST(GivenLogits, SaturatedSoftcap) {
  for (const Case& c : saturated_cases(with_size(2, 19, 211, 16, 1))) {
    for (const DType type : kDTypes) {
      SCOPED_TRACE(text(c.name, " ", name(type)));
      expect_accurate_everywhere(c, type, kLayouts[1]);
    }
  }
}

// On a GPU with clusters a row is shared by blocks, any number of them; without, and beyond what
// blocks can hold, it is read twice. Rows that begin and end anywhere.
TEST(GivenLogits, LongRows) {
  for (const std::int64_t V : {40009, 131073, 524288}) {
    Case c = with_size(1, V > 500000 ? 2 : 3, V, 1);
    c.ignored = 0;
    c.lse_gradient = true;
    for (const DType type : kDTypes) {
      for (const Layout& layout : kLayouts) {
        const bool odd = &layout == &kLayouts[1];  // of the longest, only these
        if (V > 50000 && (!odd || type == DType::f64 || type == DType::f16)) continue;
        SCOPED_TRACE(text(c.name, " ", name(type), " ", layout.name));
        LogitsData made = make_logits(c, type, layout);
        evaluate(made);
        for (const Device device : devices()) {
          for (const int blocks : {0, 1, 2, 4, 8}) {
            if (device == Device::cpu && blocks > 0) break;
            if (V > 500000 && blocks != 0 && blocks != 8) continue;
            SCOPED_TRACE(blocks);
            try {
              const Result got = run(made, device, Way::at_once, true, layout, blocks);
              expect_accurate(made, got);
              const Result again = run(made, device, Way::at_once, true, layout, blocks);
              EXPECT_EQ(again.rows.first_difference(got.rows), "");
              EXPECT_TRUE(again.gradient.array.buffer.same_bytes(got.gradient.array.buffer));
            } catch (const Error& error) {  // a GPU without clusters says so
              EXPECT_EQ(error.code(), ErrorCode::unsupported) << error.what();
              EXPECT_GT(blocks, 1) << error.what();
            }
          }
        }
      }
    }
  }
}

// As rows.h has them, but for these rows. `centred`: by rows.zbar_centred, which keeps the
// digits of logits with a common offset.
void expect_loss_from_terms(const LogitsData& made, bool centred, double allowed) {
  const std::int64_t N = row_count(made.problem);
  for (const Device device : devices()) {
    Problem p = made.problem;
    p.device = device;
    Array nll(DType::f32, N), lse(DType::f32, N), zbar(DType::f32, N), loss(DType::f32, 1);
    Buffer undefined(1);
    Weighting weighting;
    weighting.mean = true;
    weighting.label_smoothing = 0.25;
    auto* flag = reinterpret_cast<bool*>(undefined.on(device));
    const LossTerms terms{nll.on(device), lse.on(device), nullptr, zbar.on(device), flag};
    const Inputs in = made.data.inputs(device);
    loss_terms(loss_rows(p), weighting, in.targets, terms, nullptr);
    Outputs out = outputs_for(made.data.problem);
    LogitsArgs args;
    args.logits = made.logits.on(device);
    args.targets = in.targets;
    args.rows = out.rows(device);
    (centred ? args.rows.zbar : args.rows.zbar_centred) = nullptr;
    forward(p, args);
    args.upstream.d_nll = terms.nll;
    args.upstream.d_lse = terms.lse;
    args.upstream.d_zbar = terms.zbar;
    weighted_loss(p, args, loss.on(device), flag);
    loss.buffer.fetch();
    double want = 0, count = 0;
    for (std::int64_t n = 0; n < N; ++n) {
      if (made.want.target[n] < 0) continue;
      want += 0.75 * made.want.nll[n] + 0.25 * (made.want.log_sum[n] - made.want.zbar_centred[n]);
      ++count;
    }
    EXPECT_NEAR(loss.get(0), want / count, allowed);
  }
}

TEST(GivenLogits, LossFromTerms) {
  Case c = with_size(2, 9, 33, 4, 1);
  c.problem.wanted.zbar = true;
  for (const LogitKind kind : {LogitKind::random, LogitKind::offset}) {
    c.logits = kind;
    LogitsData made = make_logits(c, DType::f32, kLayouts[1]);
    evaluate(made);
    expect_loss_from_terms(made, /*centred=*/true, 2e-6);
    if (kind == LogitKind::random) expect_loss_from_terms(made, /*centred=*/false, 1e-5);
  }
}

// --- refusals -----------------------------------------------------------------------------------

struct Call {
  Problem p;
  LogitsArgs args;
};

struct Refusal {
  const char* name;
  void (*spoil)(Call&);
  std::vector<const char*> message;  // all of these are in it
  ErrorCode code = ErrorCode::invalid_value;
};

void* beyond(const void* pointer, std::int64_t bytes) {
  return const_cast<std::byte*>(static_cast<const std::byte*>(pointer)) + bytes;
}

const Refusal kRefusals[] = {
    {"length", [](Call& c) { c.p.rows.length = -1; }, {"length", ">= 0", "-1"}},
    {"vocabulary", [](Call& c) { classes_of(c.p).count = 0; }, {"V", ">= 1", "0"}},
    {"shift", [](Call& c) { c.p.rows.shift = -1; }, {"shift", ">= 0", "-1"}},
    {"row_stride",
     [](Call& c) { logits_of(c.p).row_stride = 6; },
     {"row_stride", "at least 7", "6"}},
    {"gradient_stride",
     [](Call& c) { c.p.wanted.dlogits_row_stride = 6; },
     {"dlogits_row_stride", "at least 7", "6"}},
    {"sequence_stride",
     [](Call& c) { logits_of(c.p).sequence_stride = 27; },
     {"sequence_stride", "at least 28", "27"}},
    {"softcap", [](Call& c) { c.p.transform.softcap = -1; }, {"softcap", "> 0", "-1"}},
    {"scale", [](Call& c) { c.p.transform.logit_scale = 0; }, {"logit_scale", "other than 0"}},
    {"temperature", [](Call& c) { c.p.transform.temperature = 0; }, {"temperature", "> 0"}},
    {"scale_over_temperature",
     [](Call& c) {
       c.p.transform.logit_scale = 1e30;
       c.p.transform.temperature = 1e-30;
     },
     {"logit_scale / temperature", "1e+60"}},
    {"blocks",
     [](Call& c) { logits_of(c.p).blocks_per_row = 3; },
     {"blocks_per_row", "0, 1, 2, 4 or 8", "3"}},
    {"no_logits", [](Call& c) { c.args.logits = nullptr; }, {"LogitsArgs::logits", "null"}},
    {"no_targets", [](Call& c) { c.args.targets = nullptr; }, {"LogitsArgs::targets", "null"}},
    {"no_nll", [](Call& c) { c.args.rows.nll = nullptr; }, {"rows.nll", "null"}},
    {"no_gradient", [](Call& c) { c.args.gradient = nullptr; }, {"gradient", "null"}},
    {"no_weight",
     [](Call& c) { c.p.has_class_weight = true; },
     {"LogitsArgs::class_weight", "null"}},
    {"part_of_a_vocabulary",
     [](Call& c) {
       classes_of(c.p) = {7, 7, 14};
     },
     {"first 7", "count 7", "total 14", "Linear source"},
     ErrorCode::unsupported},
    {"linear", [](Call& c) { c.p.source = Linear{}; }, {"Linear", "needs Logits", "make_plan"}},
    {"gradient_not_wanted",
     [](Call& c) { c.p.wanted.dlogits.wanted = false; },
     {"wanted.dlogits.wanted = false", "call forward"}},
    {"gradient_that_adds",
     [](Call& c) { c.p.wanted.dlogits.add = true; },
     {"wanted.dlogits.add", "leave it false"},
     ErrorCode::unsupported},
    {"gradient_of_another_type",
     [](Call& c) { c.p.wanted.dlogits.type = DType::bf16; },
     {"wanted.dlogits.type", "bf16", "f32", "unset"},
     ErrorCode::unsupported},
    {"gradient_of_a_head", [](Call& c) { c.p.wanted.dc.wanted = true; }, {"wanted.dlogits"}},
    {"upstream_unknown",
     [](Call& c) { c.p.upstream.when = Upstream::none; },
     {"upstream.when", "at_forward"}},
    {"compute_type",
     [](Call& c) { c.p.compute_type = DType::bf16; },
     {"compute_type", "bf16", "f32"},
     ErrorCode::invalid_type},
    {"num_valid", [](Call& c) { c.p.rows.num_valid = 8; }, {"num_valid", "8", "unset"}},
    {"max_workspace", [](Call& c) { c.p.max_workspace = 4096; }, {"max_workspace", "4096"}},
    {"schedule", [](Call& c) { c.p.schedule = Schedule::rows; }, {"schedule", "rows", "automatic"}},
    {"engine", [](Call& c) { c.p.engine = "cpu"; }, {"engine 'cpu'", "no plan"}},
    {"device_index", [](Call& c) { c.p.device_index = 1; }, {"device_index", "1", "the CPU"}},
    {"no_zbar", [](Call& c) { c.p.wanted.zbar = true; }, {"rows.zbar", "null"}},
    {"entropy",
     [](Call& c) {
       c.args.upstream.d_entropy = c.args.rows.nll;
       c.args.rows.entropy = c.args.rows.nll;
     },
     {"d_entropy", "upstream.entropy = false"}},
    {"overlap",
     [](Call& c) { c.args.gradient = beyond(c.args.logits, 8); },
     {"overlaps", "memory of its own"}},
    {"the_place_unsaid",
     [](Call& c) { c.args.gradient = beyond(c.args.logits, 0); },
     {"overlaps", "overwrite"}},
    {"another_place",
     [](Call& c) { logits_of(c.p).overwrite = true; },
     {"overwrite is set", "the logits' address"}},
    {"place_with_other_strides",
     [](Call& c) {
       c.args.gradient = beyond(c.args.logits, 0);
       logits_of(c.p).overwrite = true;
       c.p.wanted.dlogits_row_stride = 9;
     },
     {"strides", "the same", "9", "7"}},
};

TEST(GivenLogits, RefusalsNameBothValues) {
  const LogitsData made = make_logits(with_size(2, 4, 7, 2), DType::f32, kLayouts[0]);
  for (const Refusal& refusal : kRefusals) {
    SCOPED_TRACE(refusal.name);
    Outputs out = outputs_for(made.data.problem);
    Logits3d gradient(made.data.problem, DType::f32, kLayouts[0]);
    Call call{made.problem, {}};
    logits_of(call.p).row_stride = logits_of(call.p).sequence_stride = 0;
    call.args.logits = made.logits.on(Device::cpu);
    call.args.targets = made.data.inputs().targets;
    call.args.rows = out.rows(Device::cpu);
    call.args.gradient = gradient.on(Device::cpu);
    EXPECT_NO_THROW(forward_backward(call.p, call.args));
    refusal.spoil(call);
    try {
      forward_backward(call.p, call.args);
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), refusal.code);
      for (const char* part : refusal.message) {
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      }
    }
  }
}

// The host names a target outside of the vocabulary before it writes; a device makes its row NaN.
TEST(GivenLogits, TargetsOutsideOfTheVocabulary) {
  for (const Layout& layout : kLayouts) {
    Case c = with_size(2, 5, 100, 3, 1);
    c.ignored = 0;
    LogitsData made = make_logits(c, DType::bf16, layout);
    const std::int64_t bad = 2, N = row_count(made.problem);
    for (const Device device : devices()) {
      const Result good = run(made, device, Way::at_once, true, layout);
      LogitsData spoilt = make_logits(c, DType::bf16, layout);
      spoilt.data.set_target(bad + 1, 100);
      if (device == Device::cpu) {
        try {
          run(spoilt, device, Way::at_once, true, layout);
          ADD_FAILURE() << "not refused";
        } catch (const Error& error) {
          const std::string message = error.what();
          EXPECT_NE(message.find("position (0, 3) is 100, outside [0, V = 100)"), std::string::npos)
              << message;
        }
        continue;
      }
      const Result got = run(spoilt, device, Way::at_once, true, layout);
      const std::vector<double> a = rows_of(made, good.gradient), b = rows_of(made, got.gradient);
      for (std::int64_t n = 0; n < N; ++n) {
        EXPECT_EQ(std::isnan(got.rows.nll.get(n)), n == bad);
        for (std::int64_t i = n * 100; i < (n + 1) * 100; ++i) {
          if (n == bad) {
            EXPECT_TRUE(std::isnan(b[i]));
          } else {
            EXPECT_EQ(a[i], b[i]);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace cutloss::test
