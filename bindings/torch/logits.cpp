// The operators over logits that exist, torch.ops.cutloss.logits_*. Fakes and autograd are in
// fakes.py and operators.py of python/cutloss/_torch. Those whose name ends in an underscore write
// the gradient over the logits.
#include "cutloss/logits.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>
#include <tuple>

#include "device.h"
#include "option_reader.h"
#include "place.h"
#include "row_inputs.h"
#include "row_tensors.h"

namespace cutloss::binding {
namespace {

#define CUTLOSS_LOGITS "Tensor targets, Tensor? row_temperature, Tensor? class_weight"

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_value, message);
}

// The tensors that describe the loss, first in every schema. Logits are (sequences, length, V).
struct Operands {
  Tensor logits;
  Tensor targets;
  std::optional<Tensor> row_temperature;
  std::optional<Tensor> class_weight;

  static Operands read(Stack& s) {
    return {s.next<Tensor>(), s.next<Tensor>(), s.next<std::optional<Tensor>>(),
            s.next<std::optional<Tensor>>()};
  }
};

// The problem that the options say.
struct Options {
  Problem problem;

  static Options read(Stack& stack) {
    return {
        spec::problem_of(OptionReader(stack).read(spec::Takers::logits), Upstream::at_backward)};
  }
};

void check_shapes(const Operands& o) {
  const Tensor& z = o.logits;
  if (z.dim() != 3) refuse("logits must be (sequences, length, V), got shape " + shape(z));
  if (o.targets.dim() != 2 || o.targets.size(0) != z.size(0) || o.targets.size(1) != z.size(1)) {
    refuse("targets must be (sequences, length) of the logits, got shape " + shape(o.targets) +
           " and logits of shape " + shape(z));
  }
  const auto& w = o.class_weight;
  if (w && (w->dim() != 1 || w->size(0) != z.size(2))) {
    refuse("class_weight must be (V), got shape " + shape(*w) + " and logits of shape " + shape(z));
  }
}

// One call: the device made current, the logits where the library can read them.
class Call {
 public:
  Call(Operands operands, const Problem& options, bool in_place)
      : problem(options), o_(std::move(operands)), device_(o_.logits, "logits") {
    // PyTorch hands its number of threads to OpenMP thread by thread, when first asked there.
    if (!device_.is_cuda()) torch::stable::get_num_threads();
    check_shapes(o_);
    device_.require_here(o_.targets, "targets");
    settle(in_place);
    o_.targets = packed(o_.targets, "targets");
    problem.rows.sequences = o_.logits.size(0);
    problem.rows.length = o_.logits.size(1);
    Logits& logits = logits_of(problem);
    logits.classes.count = o_.logits.size(2);
    logits.type = dtype_of(o_.logits.scalar_type(), "logits");
    problem.rows.target_type = index_type_of(o_.targets.scalar_type());
    problem.device = device_.device();
    problem.rows.has_temperature = o_.row_temperature.has_value();
    problem.has_class_weight = o_.class_weight.has_value();
    inputs.emplace(device_, rows(), stats());
    args.stream = device_.stream();
    args.logits = o_.logits.const_data_ptr();
    args.targets = o_.targets.const_data_ptr();
    args.temperature = inputs->row(o_.row_temperature, "row_temperature");
    args.class_weight = inputs->class_weight(o_.class_weight);
    if (in_place) {
      logits.overwrite = true;
      args.gradient = data(o_.logits);
    }
  }

  std::int64_t rows() const { return row_count(problem); }
  ScalarType stats() const { return stat_type(logits_of(problem).type); }

  Tensor make(std::initializer_list<std::int64_t> sizes, ScalarType type,
              bool wanted = true) const {
    return wanted ? new_tensor(o_.logits, sizes, type) : new_tensor(o_.logits, {0}, type);
  }

  // A gradient in memory of its own.
  Tensor make_gradient() {
    const Tensor made =
        make({problem.rows.sequences, problem.rows.length, classes_of(problem).count},
             o_.logits.scalar_type());
    args.gradient = data(made);
    return made;
  }

  // args.rows becomes theirs.
  RowTensors make_rows() {
    RowTensors made(o_.logits, rows(), stats(), problem.wanted);
    args.rows = made.outputs();
    return made;
  }

  Tensor sum_loss(const std::optional<Tensor>& undefined) {
    const bool* flag = inputs->flag(undefined);
    const Tensor loss = make({}, stats());
    weighted_loss(problem, args, loss.mutable_data_ptr(), flag);
    return loss;
  }

  Problem problem;
  LogitsArgs args;
  std::optional<RowInputs> inputs;

 private:
  // Rows may begin anywhere and lie apart; only what is not in rows is read from a packed copy.
  void settle(bool in_place) {
    Tensor& z = o_.logits;
    if (const auto strides = strides_in_place(place_of(z), Device::cpu)) {
      logits_of(problem).sequence_stride = strides->sequence;
      logits_of(problem).row_stride = strides->row;
      return;
    }
    if (in_place && z.numel() > 0) {
      std::string strides;
      for (int i = 0; i < 3; ++i) strides += (i > 0 ? ", " : "") + std::to_string(z.stride(i));
      refuse(
          "the gradient cannot be written over logits whose rows do not lie one after the other: "
          "their strides are (" +
          strides +
          "); pass logits.contiguous(), or leave the logits "
          "alone");
    }
    z = packed_copy(z, "the logits");
  }

  Operands o_;
  OnDevice device_;
};

// logits_statistics(operands, terms, undefined, *, options)
//   -> (loss, nll, lse, row_max, log_sum, entropy, zbar_centred, argmax); no terms, no loss
std::tuple<Tensor, RowTensors> statistics(Operands operands, const std::optional<Tensor>& terms,
                                          const std::optional<Tensor>& undefined,
                                          const Options& options) {
  Call call(std::move(operands), options.problem, /*in_place=*/false);
  const RowTensors rows = call.make_rows();
  forward(call.problem, call.args);
  call.args.upstream = call.inputs->terms(terms);
  return {terms ? call.sum_loss(undefined) : call.make({0}, call.stats()), rows};
}

using SavedRows = std::array<Tensor, 4>;  // nll, row_max, log_sum, entropy
// d_nll, d_lse, d_lse_squared, d_entropy, d_zbar
using UpstreamRows = std::array<std::optional<Tensor>, 5>;

// What backward reads.
void give_rows(Call& call, const SavedRows& saved, const UpstreamRows& upstream) {
  RowInputs& in = *call.inputs;
  const auto read_only = [&](const Tensor& t, const char* what) {
    return const_cast<void*>(in.row(t, what));  // backward reads args.rows, never writes
  };
  RowOutputs& rows = call.args.rows;
  rows.nll = read_only(saved[0], "nll");
  rows.row_max = read_only(saved[1], "row_max");
  rows.log_sum = read_only(saved[2], "log_sum");
  if (call.problem.wanted.entropy) rows.entropy = read_only(saved[3], "entropy");
  RowGradients& up = call.args.upstream;
  up.d_nll = in.row(upstream[0], "d_nll");
  up.d_lse = in.row(upstream[1], "d_lse");
  up.d_lse_squared = in.row(upstream[2], "d_lse_squared");
  up.d_entropy = in.row(upstream[3], "d_entropy");
  up.d_zbar = in.row(upstream[4], "d_zbar");
}

// logits_gradient(operands, nll, row_max, log_sum, entropy, d_nll, d_lse, d_lse_squared, d_entropy,
//                 d_zbar, *, options) -> gradient
Tensor gradient(Operands operands, const SavedRows& saved, const UpstreamRows& upstream,
                const Options& options) {
  Call call(std::move(operands), options.problem, /*in_place=*/false);
  give_rows(call, saved, upstream);
  const Tensor made = call.make_gradient();
  backward(call.problem, call.args);
  return made;
}

// logits_gradient_: the same in the logits' place
void gradient_in_place(Operands operands, const SavedRows& saved, const UpstreamRows& upstream,
                       const Options& options) {
  Call call(std::move(operands), options.problem, /*in_place=*/true);
  give_rows(call, saved, upstream);
  backward(call.problem, call.args);
}

// What a call makes that has a place for the gradient: loss, argmax.
std::tuple<Tensor, Tensor> make_both(Call& call, const Tensor& terms,
                                     const std::optional<Tensor>& undefined) {
  const RowTensors rows = call.make_rows();
  call.args.upstream = call.inputs->terms(terms);
  forward_backward(call.problem, call.args);
  return {call.sum_loss(undefined), rows.argmax};
}

// logits_loss_and_gradient(operands, terms, undefined, *, options) -> (loss, argmax, gradient)
std::tuple<Tensor, Tensor, Tensor> loss_and_gradient(Operands operands, const Tensor& terms,
                                                     const std::optional<Tensor>& undefined,
                                                     const Options& options) {
  Call call(std::move(operands), options.problem, /*in_place=*/false);
  const Tensor made = call.make_gradient();
  const auto [loss, argmax] = make_both(call, terms, undefined);
  return {loss, argmax, made};
}

// logits_loss_and_gradient_: the same in the logits' place
std::tuple<Tensor, Tensor> loss_and_gradient_in_place(Operands operands, const Tensor& terms,
                                                      const std::optional<Tensor>& undefined,
                                                      const Options& options) {
  Call call(std::move(operands), options.problem, /*in_place=*/true);
  return make_both(call, terms, undefined);
}

#define CUTLOSS_SAVED                                                           \
  "Tensor nll, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor? d_nll, " \
  "Tensor? d_lse, Tensor? d_lse_squared, Tensor? d_entropy, Tensor? d_zbar"

template <Device device, class Library>
void implement(Library& m) {
  m.impl("logits_statistics", &boxed<statistics, device>);
  m.impl("logits_gradient", &boxed<gradient, device>);
  m.impl("logits_gradient_", &boxed<gradient_in_place, device>);
  m.impl("logits_loss_and_gradient", &boxed<loss_and_gradient, device>);
  m.impl("logits_loss_and_gradient_", &boxed<loss_and_gradient_in_place, device>);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cutloss, m) {
  const auto def = [&](const char* schema) {
    m.def(spec::with_options(spec::Takers::logits, schema).c_str());
  };
  def("logits_statistics(Tensor logits, " CUTLOSS_LOGITS
      ", Tensor? terms=None, Tensor? undefined=None, *, OPTIONS) -> (Tensor loss, Tensor nll, "
      "Tensor lse, Tensor row_max, Tensor log_sum, "
      "Tensor entropy, Tensor zbar_centred, Tensor argmax)");
  def("logits_gradient(Tensor logits, " CUTLOSS_LOGITS ", " CUTLOSS_SAVED
      ", *, OPTIONS) -> Tensor");
  def("logits_gradient_(Tensor(a!) logits, " CUTLOSS_LOGITS ", " CUTLOSS_SAVED
      ", *, OPTIONS) -> ()");
  def("logits_loss_and_gradient(Tensor logits, " CUTLOSS_LOGITS
      ", Tensor terms, Tensor? undefined=None, *, OPTIONS) -> (Tensor loss, Tensor argmax, Tensor "
      "gradient)");
  def("logits_loss_and_gradient_(Tensor(a!) logits, " CUTLOSS_LOGITS
      ", Tensor terms, Tensor? undefined=None, *, OPTIONS) -> (Tensor loss, Tensor argmax)");
}

STABLE_TORCH_LIBRARY_IMPL(cutloss, CPU, m) { implement<Device::cpu>(m); }

// In every build: one without CUDA says so.
STABLE_TORCH_LIBRARY_IMPL(cutloss, CUDA, m) { implement<Device::cuda>(m); }

}  // namespace cutloss::binding
