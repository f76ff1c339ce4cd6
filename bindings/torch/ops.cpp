// The operators of torch.ops.cutloss. Fakes and autograd are in fakes.py and operators.py
// of python/cutloss/_torch.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef CUTLOSS_CUDA
#include <cuda_runtime_api.h>
#endif

#include "call.h"
#include "chunks.h"
#include "place.h"
#include "shards.h"
#include "spec/plan_fields.h"
#include "terms.h"

namespace cutloss::binding {
namespace {

using torch::stable::accelerator::DeviceGuard;

// statistics(operands, terms, undefined, *, options)
//   -> (loss, nll, lse, row_max, log_sum, entropy, zbar_centred, argmax, kept); no terms, no loss
std::tuple<Tensor, RowTensors, Tensor> statistics(Operands operands,
                                                  const std::optional<Tensor>& terms,
                                                  const std::optional<Tensor>& undefined,
                                                  const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_backward);
  const Plan& plan = call.plan();
  const RowTensors rows = call.make_rows();
  const Tensor kept = call.make({call.kept_bytes()}, ScalarType::Byte);
  const Workspace workspace = call.scratch(plan.forward_workspace_bytes);

  call.args.rows = rows.outputs();
  call.args.kept = data(kept);
  call.args.workspace = workspace.data();
  forward(plan, call.args);
  call.args.upstream = call.inputs().terms(terms);
  return {terms ? call.sum_loss(undefined) : call.make({0}, call.stats()), rows, kept};
}

using SavedRows = std::array<Tensor, 5>;  // nll, row_max, log_sum, entropy, kept
// d_nll, d_lse, d_lse_squared, d_entropy, d_zbar
using UpstreamRows = std::array<std::optional<Tensor>, 5>;

// de, dc, dbias; dC is added to dc_into where there is one.
std::tuple<Tensor, Tensor, Tensor> make_gradients(Operands operands, const SavedRows& saved,
                                                  const UpstreamRows& upstream,
                                                  const std::optional<Tensor>& dc_into,
                                                  const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_backward);
  const Plan& plan = call.plan();

  const auto read_only = [&](const Tensor& t, const char* what) {
    return const_cast<void*>(call.inputs().row(t, what));  // backward reads args.rows, never writes
  };
  RowOutputs& rows = call.args.rows;
  rows.nll = read_only(saved[0], "nll");
  rows.row_max = read_only(saved[1], "row_max");
  rows.log_sum = read_only(saved[2], "log_sum");
  if (options.problem.wanted.entropy) rows.entropy = read_only(saved[3], "entropy");
  if (saved[4].numel() != call.kept_bytes()) {
    throw Error(ErrorCode::invalid_value, "kept must have " + std::to_string(call.kept_bytes()) +
                                              " bytes, got " + std::to_string(saved[4].numel()));
  }
  call.args.kept = data(saved[4]);
  RowGradients& up = call.args.upstream;
  up.d_nll = call.inputs().row(upstream[0], "d_nll");
  up.d_lse = call.inputs().row(upstream[1], "d_lse");
  up.d_lse_squared = call.inputs().row(upstream[2], "d_lse_squared");
  up.d_entropy = call.inputs().row(upstream[3], "d_entropy");
  up.d_zbar = call.inputs().row(upstream[4], "d_zbar");

  const Tensor de = call.make_de();
  const Tensor dc = dc_into ? call.added_dc(dc_into) : call.make_dc();
  const Tensor dbias = call.make_dbias();
  const Workspace workspace = call.scratch(plan.backward_workspace_bytes);
  call.args.gradients = {data(de), data(dc), data(dbias)};
  call.args.workspace = workspace.data();
  backward(plan, call.args);
  return {de, dc, dbias};
}

// gradients(operands, nll, row_max, log_sum, entropy, kept, d_nll, d_lse, d_lse_squared,
//           d_entropy, d_zbar, *, options) -> (de, dc, dbias)
std::tuple<Tensor, Tensor, Tensor> gradients(Operands operands, const SavedRows& saved,
                                             const UpstreamRows& upstream,
                                             const spec::Options& options) {
  return make_gradients(std::move(operands), saved, upstream, std::nullopt, options);
}

// gradients_(the same, dc_into, *, options) -> (de, dbias): dC is added to dc_into
std::tuple<Tensor, Tensor> add_gradients(Operands operands, const SavedRows& saved,
                                         const UpstreamRows& upstream, const Tensor& dc_into,
                                         const spec::Options& options) {
  const auto [de, dc, dbias] =
      make_gradients(std::move(operands), saved, upstream, dc_into, options);
  return {de, dbias};
}

// loss_and_gradients(operands, token_weight, weight, *, mean, label_smoothing, z_loss, options)
//   -> (loss, undefined, argmax, de, dc, dbias); of no gradients the loss alone
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_gradients(
    Operands operands, const WeightTensors& tensors, const RowWeights& weights,
    const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_forward);
  const Plan& plan = call.plan();
  const bool makes_gradients = plan.problem.upstream.when != Upstream::none;
  const RowsInOne rows = call.make_rows_in_one();
  call.args.rows = rows.outputs;
  const Workspace workspace = call.scratch(plan.forward_workspace_bytes);
  call.args.workspace = workspace.data();
  // Without gradients all that can wait comes after the products, which the device so begins
  // sooner.
  if (!makes_gradients) forward(plan, call.args);
  const Terms terms = call.make_terms(tensors, weights);
  call.args.upstream = call.inputs().terms(terms.terms);
  const Tensor de = call.make_de();
  const Tensor dc = call.make_dc();
  const Tensor dbias = call.make_dbias();
  if (makes_gradients) {
    const Workspace kept = call.scratch(plan.kept_bytes);
    call.args.kept = kept.data();
    call.args.gradients = {data(de), data(dc), data(dbias)};
    forward_backward(plan, call.args);
  }
  const Tensor loss = call.sum_loss(terms.undefined);
  return {loss, terms.undefined, rows.argmax, de, dc, dbias};
}

void multiply(const Tensor& t, const Tensor& factor) {
  std::array<StableIValue, 2> args{torch::stable::detail::from(t),
                                   torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", args.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(args[0]);  // the result is t again: drop the reference
}

bool is_one(const Tensor& factor) {
  const void* value = factor.const_data_ptr();
  if (factor.scalar_type() == ScalarType::Double) return *static_cast<const double*>(value) == 1.0;
  if (factor.scalar_type() == ScalarType::Float) return *static_cast<const float*>(value) == 1.0f;
  return false;
}

// scale_(t, factor): t *= factor, and nothing at all where the factor is 1.
void scale(const Tensor& t, const Tensor& factor) {
  if (factor.numel() != 1) {
    throw Error(ErrorCode::invalid_value,
                "scale_ takes a factor of one element, got " + std::to_string(factor.numel()));
  }
  const OnDevice here(t);
  if (!here.is_cuda()) {
    if (!is_one(factor)) multiply(t, factor);
    return;
  }
  if (t.numel() == 0) return;
  // What the factor is, only the device knows.
  const ScalarType type = factor.scalar_type();
  const bool is_here = factor.is_cuda() && factor.get_device_index() == t.get_device_index();
  if (!t.is_contiguous() || !is_here || (type != ScalarType::Float && type != ScalarType::Double)) {
    multiply(t, factor);
    return;
  }
  scale_in_place(Device::cuda, dtype_of(t.scalar_type(), "t"), data(t), t.numel(),
                 dtype_of(type, "factor"), factor.const_data_ptr(), here.stream());
}

// e_strides and c_strides are empty for packed tensors; an offset is that of the first element past
// a multiple of 16 bytes.
#define CUTLOSS_PLAN_SIZES                                                            \
  "int sequences, int length, int V, int D, ScalarType e_dtype, ScalarType c_dtype, " \
  "ScalarType? bias_dtype, ScalarType target_dtype, bool has_row_temperature, "       \
  "bool has_class_weight, bool known_at_forward, bool on_cuda, int device_index=-1, " \
  "int[] e_strides=[], int e_offset=0, int[] c_strides=[], int c_offset=0"

// What becomes of a tensor of `dims` dimensions, (..., rows, D), that a plan is told of.
Strides told_strides(Place place, const std::vector<std::int64_t>& strides, std::size_t dims,
                     Device device, const char* what) {
  if (strides.empty()) return {};
  if (strides.size() != dims) {
    throw Error(ErrorCode::invalid_value, std::string(what) + " must be " + std::to_string(dims) +
                                              " numbers or none, got " +
                                              std::to_string(strides.size()));
  }
  std::copy(strides.begin(), strides.end(), place.strides.end() - dims);
  return strides_in_place(place, device).value_or(Strides{});
}

// What CUTLOSS_PLAN_SIZES names.
struct PlanSizes {
  std::int64_t sequences, length, V, D;
  ScalarType e, c;
  std::optional<ScalarType> bias;
  ScalarType targets;
  bool has_row_temperature, has_class_weight, known_at_forward, on_cuda;
  std::int64_t device_index;
  std::vector<std::int64_t> e_strides;
  std::int64_t e_offset;
  std::vector<std::int64_t> c_strides;
  std::int64_t c_offset;

  static PlanSizes read(Stack& s) {
    using Numbers = std::vector<std::int64_t>;
    return {s.next<std::int64_t>(),
            s.next<std::int64_t>(),
            s.next<std::int64_t>(),
            s.next<std::int64_t>(),
            s.next<ScalarType>(),
            s.next<ScalarType>(),
            s.next<std::optional<ScalarType>>(),
            s.next<ScalarType>(),
            s.next<bool>(),
            s.next<bool>(),
            s.next<bool>(),
            s.next<bool>(),
            s.next<std::int64_t>(),
            s.next<Numbers>(),
            s.next<std::int64_t>(),
            s.next<Numbers>(),
            s.next<std::int64_t>()};
  }
};

// A problem without data. Its CUDA device becomes the current one for as long as `guard` lives.
Problem told_problem(const PlanSizes& sizes, const spec::Options& options,
                     std::unique_ptr<DeviceGuard>& guard) {
  Problem p = spec::problem_of(
      options, sizes.known_at_forward ? Upstream::at_forward : Upstream::at_backward);
  p.rows.sequences = sizes.sequences;
  p.rows.length = sizes.length;
  p.device = sizes.on_cuda ? Device::cuda : Device::cpu;
  Head& head = head_of(p);
  head.classes.count = sizes.V;
  head.D = sizes.D;
  const Strides of_e =
      told_strides({{sizes.sequences, sizes.length, sizes.D}, {}, sizes.e, sizes.e_offset},
                   sizes.e_strides, 3, p.device, "e_strides");
  const Strides of_c = told_strides({{1, sizes.V, sizes.D}, {}, sizes.c, sizes.c_offset},
                                    sizes.c_strides, 2, p.device, "c_strides");
  head.e_sequence_stride = of_e.sequence;
  head.e_row_stride = of_e.row;
  head.c_row_stride = of_c.row;
  head.e_type = dtype_of(sizes.e, "e");
  head.c_type = dtype_of(sizes.c, "c");
  head.has_bias = sizes.bias.has_value();
  head.bias_type = sizes.bias ? dtype_of(*sizes.bias, "bias") : head.c_type;
  p.rows.target_type = index_type_of(sizes.targets);
  p.rows.has_temperature = sizes.has_row_temperature;
  p.has_class_weight = sizes.has_class_weight;
  try {
    if (sizes.on_cuda && sizes.device_index >= 0) {
      guard = std::make_unique<DeviceGuard>(static_cast<std::int32_t>(sizes.device_index));
      p.device_index = static_cast<int>(sizes.device_index);
    }
  } catch (const std::runtime_error&) {
    // A device of fake tensors only. What is missing, the engines say.
  }
  return p;
}

// plan(sizes, *, options) -> JSON (spec/plan_fields.h)
std::string plan(const PlanSizes& sizes, const spec::Options& options) {
  std::unique_ptr<DeviceGuard> guard;
  const Problem problem = told_problem(sizes, options, guard);
  return spec::plan_fields(problem, spec::decide(problem));
}

// choice(sizes, *, options) -> (in_forward, schedule, kept_bytes): what of it a call must know
std::tuple<bool, std::int64_t, std::int64_t> choice(const PlanSizes& sizes,
                                                    const spec::Options& options) {
  std::unique_ptr<DeviceGuard> guard;
  const spec::Decided decided = spec::decide(told_problem(sizes, options, guard));
  const Plan& plan = *decided.plan;
  return {decided.in_forward, static_cast<std::int64_t>(plan.schedule),
          plan.keeps_logits ? plan.kept_bytes : 0};
}

// plan_for_rows(sizes, *, options) -> JSON: the same for each number of rows (spec/decide.h)
std::string plan_for_rows(const PlanSizes& sizes, const spec::Options& options) {
  std::unique_ptr<DeviceGuard> guard;
  return spec::fields_for_rows(told_problem(sizes, options, guard));
}

// waits_for_loss_scale(dtype): whether gradients of that dtype are made in backward alone
bool waits_for_loss_scale(ScalarType dtype) {
  return cutloss::waits_for_loss_scale(dtype_of(dtype, "dtype"));
}

// Of the CUDA runtime that is in this library, as CUDA counts: 13000 for 13.0. 0 where there is
// none.
std::int64_t cuda_version() {
#ifdef CUTLOSS_CUDA
  return CUDART_VERSION;
#else
  return 0;
#endif
}

// What the CUDA kernels were compiled for, as it was written for the build.
std::string cuda_code() {
#ifdef CUTLOSS_CUDA
  return CUTLOSS_CUDA_CODE;
#else
  return {};
#endif
}

std::string version() { return CUTLOSS_VERSION; }

std::string engines() { return spec::engine_fields(); }

}  // namespace

STABLE_TORCH_LIBRARY(cutloss, m) {
  const auto def = [&](const char* schema) {
    m.def(spec::with_options(spec::Takers::linear, schema).c_str());
  };
  def("statistics(" CUTLOSS_OPERANDS
      ", Tensor? terms=None, Tensor? undefined=None, *, OPTIONS) -> (Tensor loss, Tensor nll, "
      "Tensor lse, Tensor row_max, Tensor log_sum, Tensor entropy, "
      "Tensor zbar_centred, Tensor argmax, Tensor kept)");
  def("gradients(" CUTLOSS_OPERANDS
      ", Tensor nll, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor kept, "
      "Tensor? d_nll, Tensor? d_lse, Tensor? d_lse_squared, Tensor? d_entropy, "
      "Tensor? d_zbar, *, OPTIONS) -> (Tensor de, Tensor dc, Tensor dbias)");
  def("gradients_(" CUTLOSS_OPERANDS
      ", Tensor nll, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor kept, "
      "Tensor? d_nll, Tensor? d_lse, Tensor? d_lse_squared, Tensor? d_entropy, "
      "Tensor? d_zbar, Tensor(a!) dc_into, *, OPTIONS) -> (Tensor de, Tensor dbias)");
  def("loss_and_gradients(" CUTLOSS_OPERANDS
      ", Tensor? token_weight=None, Tensor? weight=None, *, " CUTLOSS_ROW_WEIGHTS
      ", OPTIONS) -> (Tensor loss, Tensor undefined, Tensor argmax, Tensor de, Tensor dc, Tensor "
      "dbias)");
  m.def(
      "loss_terms(Tensor targets, Tensor? token_weight, Tensor? class_weight, "
      "ScalarType compute_dtype, SymInt V, int shift, int ignore_index, bool mean, "
      "float label_smoothing, float z_loss) -> (Tensor terms, Tensor undefined)");
  def("open_statistics(" CUTLOSS_OPERANDS
      ", int before, *, OPTIONS) -> (Tensor states, Tensor kept)");
  m.def("empty_states(Tensor like, SymInt rows, ScalarType stat_dtype) -> Tensor");
  m.def(
      "close_rows(Tensor states, Tensor targets, Tensor? class_weight, Tensor? is_right, "
      "int before, ScalarType stat_dtype, SymInt V, int shift, int ignore_index, bool "
      "wants_entropy, bool wants_zbar, "
      "bool wants_argmax) -> (Tensor nll, Tensor lse, Tensor row_max, Tensor log_sum, "
      "Tensor entropy, Tensor zbar_centred, Tensor argmax)");
  def("chunks_begin(" CUTLOSS_OPERANDS
      ", *, OPTIONS) -> (Tensor nll, Tensor lse, Tensor row_max, Tensor log_sum, Tensor entropy, "
      "Tensor de, "
      "Tensor dc, Tensor dbias, Tensor memory, int chunks)");
  def("chunk_statistics(" CUTLOSS_OPERANDS ", " CUTLOSS_CHUNK_STATE
      ", int chunk, *, OPTIONS) -> int[]");
  def("chunk_gradients(" CUTLOSS_OPERANDS ", " CUTLOSS_CHUNK_STATE
      ", Tensor? d_nll, Tensor? d_lse, Tensor? d_entropy, int chunk, *, OPTIONS) -> ()");
  def("chunks_finish(" CUTLOSS_OPERANDS ", " CUTLOSS_CHUNK_STATE ", *, OPTIONS) -> ()");
  m.def("is_read_in_place(Tensor t) -> bool");
  m.def("scale_(Tensor(a!) t, Tensor factor) -> ()");
  def("plan(" CUTLOSS_PLAN_SIZES ", *, OPTIONS) -> str");
  def("choice(" CUTLOSS_PLAN_SIZES
      ", *, OPTIONS) -> (bool in_forward, int schedule, int kept_bytes)");
  def("plan_for_rows(" CUTLOSS_PLAN_SIZES ", *, OPTIONS) -> str");
  m.def("waits_for_loss_scale(ScalarType dtype) -> bool");
  m.def("engines() -> str");
  m.def("cuda_version() -> int");
  m.def("cuda_code() -> str");
  m.def("version() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cutloss, CPU, m) {
  m.impl("statistics", &boxed<statistics>);
  m.impl("gradients", &boxed<gradients>);
  m.impl("gradients_", &boxed<add_gradients>);
  m.impl("loss_and_gradients", &boxed<loss_and_gradients>);
  m.impl("loss_terms", &boxed<loss_terms>);
  m.impl("open_statistics", &boxed<open_statistics>);
  m.impl("empty_states", &boxed<empty_states>);
  m.impl("close_rows", &boxed<close_rows>);
  m.impl("chunks_begin", &boxed<chunks_begin>);
  m.impl("chunk_statistics", &boxed<chunk_statistics>);
  m.impl("chunk_gradients", &boxed<chunk_gradients>);
  m.impl("chunks_finish", &boxed<chunks_finish>);
  m.impl("is_read_in_place", &boxed<is_read_in_place>);
  m.impl("scale_", &boxed<scale>);
}

// In every build: one without CUDA says that no engine takes the problem, and why.
STABLE_TORCH_LIBRARY_IMPL(cutloss, CUDA, m) {
  m.impl("statistics", &boxed<statistics, Device::cuda>);
  m.impl("gradients", &boxed<gradients, Device::cuda>);
  m.impl("gradients_", &boxed<add_gradients, Device::cuda>);
  m.impl("loss_and_gradients", &boxed<loss_and_gradients, Device::cuda>);
  m.impl("loss_terms", &boxed<loss_terms, Device::cuda>);
  m.impl("open_statistics", &boxed<open_statistics, Device::cuda>);
  m.impl("empty_states", &boxed<empty_states, Device::cuda>);
  m.impl("close_rows", &boxed<close_rows, Device::cuda>);
  m.impl("chunks_begin", &boxed<chunks_begin, Device::cuda>);
  m.impl("chunk_statistics", &boxed<chunk_statistics, Device::cuda>);
  m.impl("chunk_gradients", &boxed<chunk_gradients, Device::cuda>);
  m.impl("chunks_finish", &boxed<chunks_finish, Device::cuda>);
  m.impl("is_read_in_place", &boxed<is_read_in_place, Device::cuda>);
  m.impl("scale_", &boxed<scale, Device::cuda>);
}

// No tensor among their arguments, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(cutloss, CompositeExplicitAutograd, m) {
  m.impl("plan", &boxed<plan>);
  m.impl("choice", &boxed<choice>);
  m.impl("plan_for_rows", &boxed<plan_for_rows>);
  m.impl("waits_for_loss_scale", &boxed<waits_for_loss_scale>);
  m.impl("engines", &boxed<engines>);
  m.impl("cuda_version", &boxed<cuda_version>);
  m.impl("cuda_code", &boxed<cuda_code>);
  m.impl("version", &boxed<version>);
}

}  // namespace cutloss::binding
