#include "call.h"

#include "place.h"
#include "spec/plan_cache.h"

#include <torch/csrc/stable/ops.h>

#include <string>

namespace cutloss::binding {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_value, message);
}

// Where the library cannot read a tensor in place, it becomes a packed copy.
Strides settle(Tensor& t, Device device, const char* what) {
  if (const auto strides = strides_in_place(place_of(t), device)) return *strides;
  t = packed_copy(t, what);
  return {};
}

void check_shapes(const Operands& o, const spec::Options& options) {
  const std::int64_t total = classes_of(options.problem).total;
  const std::int64_t V = total != 0 ? total : o.c.size(0);
  if (o.e.dim() != 3) refuse("e must be (sequences, length, D), got shape " + shape(o.e));
  if (o.c.dim() != 2) refuse("c must be (V, D), got shape " + shape(o.c));
  if (o.e.size(2) != o.c.size(1)) {
    refuse("e and c must agree in D, got e of shape " + shape(o.e) + " and c of shape " +
           shape(o.c));
  }
  if (o.targets.dim() != 2 || o.targets.size(0) != o.e.size(0) ||
      o.targets.size(1) != o.e.size(1)) {
    refuse("targets must be (sequences, length) of e, got shape " + shape(o.targets) +
           " and e of shape " + shape(o.e));
  }
  const auto need_vector = [&](const std::optional<Tensor>& t, std::int64_t count,
                               const char* what) {
    if (!t || (t->dim() == 1 && t->size(0) == count)) return;
    refuse(std::string(what) + " must be (" + std::to_string(count) + "), got shape " + shape(*t) +
           " and c of shape " + shape(o.c));
  };
  need_vector(o.bias, o.c.size(0), "bias");
  need_vector(o.class_weight, V, "class_weight");
}

template <class Index>
std::int64_t count_valid(const Rows& rows, const Index* targets) {
  std::int64_t count = 0;
  for (std::int64_t sequence = 0; sequence < rows.sequences; ++sequence) {
    for (std::int64_t i = rows.shift; i < rows.length; ++i) {
      count += targets[sequence * rows.length + i] != rows.ignore_index ? 1 : 0;
    }
  }
  return count;
}

// On the host a wrong number costs nothing to find. On a device it would cost a synchronisation;
// there the library makes it NaN.
void check_num_valid(const Rows& rows, const void* targets) {
  if (!rows.num_valid) return;
  const std::int64_t count = rows.target_type == IndexType::i64
                                 ? count_valid(rows, static_cast<const std::int64_t*>(targets))
                                 : count_valid(rows, static_cast<const std::int32_t*>(targets));
  if (*rows.num_valid == count) return;
  refuse("num_valid is " + std::to_string(*rows.num_valid) + ", but " + std::to_string(count) +
         " of the " + std::to_string(row_count(rows)) +
         " targets that are predicted are not ignore_index = " + std::to_string(rows.ignore_index));
}

}  // namespace

Operands Operands::read(Stack& s) {
  Operands o;
  o.e = s.next<Tensor>();
  o.c = s.next<Tensor>();
  o.bias = s.next<std::optional<Tensor>>();
  o.targets = s.next<Tensor>();
  o.row_temperature = s.next<std::optional<Tensor>>();
  o.class_weight = s.next<std::optional<Tensor>>();
  return o;
}

Call::Call(Operands operands, const spec::Options& options, Upstream upstream)
    : operands_(std::move(operands)), device_(operands_.e) {
  // PyTorch hands its number of threads to OpenMP thread by thread, when first asked there.
  if (!device_.is_cuda()) torch::stable::get_num_threads();

  Operands& o = operands_;
  check_shapes(o, options);
  device_.require_here(o.c, "c");
  device_.require_here(o.targets, "targets");
  if (o.bias) device_.require_here(*o.bias, "bias");
  const Strides e_strides = settle(o.e, device_.device(), "e");
  const Strides c_strides = settle(o.c, device_.device(), "c");
  o.targets = packed(o.targets, "targets");
  if (o.bias) o.bias = packed(*o.bias, "bias");

  Problem p = spec::problem_of(options, upstream);
  p.rows.sequences = o.e.size(0);
  p.rows.length = o.e.size(1);
  Head& head = head_of(p);
  head.classes.count = o.c.size(0);
  head.D = o.c.size(1);
  head.e_sequence_stride = e_strides.sequence;
  head.e_row_stride = e_strides.row;
  head.c_row_stride = c_strides.row;
  head.e_type = dtype_of(o.e.scalar_type(), "e");
  head.c_type = dtype_of(o.c.scalar_type(), "c");
  head.has_bias = o.bias.has_value();
  head.bias_type = head.has_bias ? dtype_of(o.bias->scalar_type(), "bias") : head.c_type;
  p.rows.target_type = index_type_of(o.targets.scalar_type());
  p.rows.has_temperature = o.row_temperature.has_value();
  p.has_class_weight = o.class_weight.has_value();
  p.device = device_.device();
  p.device_index = device_.index();
  plan_ = spec::plan_for(p);
  if (kept_bytes() != options.kept_bytes) {
    refuse("kept_bytes must be what the plan says, " + std::to_string(kept_bytes()) + ", got " +
           std::to_string(options.kept_bytes));
  }

  if (!device_.is_cuda()) check_num_valid(plan_->problem.rows, o.targets.const_data_ptr());

  inputs_.emplace(device_, rows(), stats());
  args.stream = device_.stream();
  args.in.e = o.e.const_data_ptr();
  args.in.c = o.c.const_data_ptr();
  args.in.bias = o.bias ? o.bias->const_data_ptr() : nullptr;
  args.in.targets = o.targets.const_data_ptr();
  args.in.temperature = inputs_->row(o.row_temperature, "row_temperature");
  args.in.class_weight = inputs_->class_weight(o.class_weight);
}

Tensor Call::sum_loss(const std::optional<Tensor>& undefined) {
  const bool* flag = inputs_->flag(undefined);
  const Tensor loss = make({}, stats());
  weighted_loss(plan(), args, loss.mutable_data_ptr(), flag);
  return loss;
}

Terms Call::make_terms(const WeightTensors& tensors, const RowWeights& weights) const {
  LossRows rows = loss_rows(plan_->problem);
  rows.rows.num_valid.reset();  // of the library's own rows; a sum counts them itself
  return binding::make_terms(rows, tensors, weights, operands_.targets);
}

Tensor Call::make(std::initializer_list<std::int64_t> sizes, ScalarType type, bool wanted) const {
  return wanted ? new_tensor(operands_.e, sizes, type) : new_tensor(operands_.e, {0}, type);
}

Tensor Call::make_de() const {
  const Problem& p = plan_->problem;
  return make({p.rows.sequences, p.rows.length, head_of(p).D},
              p.wanted.de.type ? stats() : operands_.e.scalar_type(), p.wanted.de.wanted);
}

Tensor Call::make_dc() const {
  const Head& head = head_of(plan_->problem);
  if (plan_->problem.wanted.dc.add) {
    throw Error(ErrorCode::invalid_value,
                "dC is to be added to a tensor, which `gradients_` alone takes");
  }
  return make({head.classes.count, head.D}, operands_.c.scalar_type(),
              plan_->problem.wanted.dc.wanted);
}

Tensor Call::added_dc(const std::optional<Tensor>& given) const {
  const Problem& p = plan_->problem;
  const Head& head = head_of(p);
  if (!p.wanted.dc.wanted || !p.wanted.dc.add || !given || given->dim() != 2 ||
      given->size(0) != head.classes.count || given->size(1) != head.D ||
      given->scalar_type() != stats() || !given->is_contiguous()) {
    refuse("dC is to be added to a contiguous tensor of c's shape " + shape(operands_.c) +
           " in the dtype of its sums, got " + (given ? "shape " + shape(*given) : "none"));
  }
  device_.require_here(*given, "the tensor that dC is added to");
  return *given;
}

Tensor Call::make_dbias() const {
  const Head& head = head_of(plan_->problem);
  return make({head.classes.count},
              head.has_bias ? operands_.bias->scalar_type() : ScalarType::Float,
              plan_->problem.wanted.dbias.wanted);
}

}  // namespace cutloss::binding
