// The arguments that all operators share, read from the stack, and what becomes of them.
#pragma once

#include <memory>
#include <optional>

#include "convert.h"
#include "device.h"
#include "row_inputs.h"
#include "row_tensors.h"

namespace cutloss::binding {

// The tensors that describe the loss, first in every schema. E is (sequences, length, D).
struct Operands {
  Tensor e;
  Tensor c;
  std::optional<Tensor> bias;
  Tensor targets;
  std::optional<Tensor> row_temperature;
  std::optional<Tensor> class_weight;
};

// The keyword arguments, last in every schema.
struct Options {
  ScalarType compute;
  std::int64_t shift;
  std::int64_t ignore_index;
  std::optional<double> softcap;
  double logit_scale;
  double temperature;
  bool wants_entropy;
  bool wants_zbar;
  bool wants_argmax;
  bool needs_de;
  bool needs_dc;
  bool needs_dbias;
  std::int64_t schedule;  // 0 automatic, 1 none, 2 rows, 3 vocabulary
  std::optional<std::int64_t> max_workspace;
  std::int64_t kept_bytes;  // what the plan keeps from forward to backward; its tensor's size
  std::optional<std::int64_t> num_valid;
  bool allow_tf32;
  // Of a shard (shards.cpp); a total of 0 is a whole vocabulary.
  std::int64_t first_class;
  std::int64_t total_classes;
  bool de_in_sums;  // dE in the dtype of its sums
  bool dc_adds;     // dC is added, in the dtype of its sums, to a tensor that `gradients_` is given
};

#define CUTLOSS_OPERANDS                                                                \
  "Tensor e, Tensor c, Tensor? bias, Tensor targets, Tensor? row_temperature, Tensor? " \
  "class_weight"
#define CUTLOSS_OPTIONS                                                                        \
  "ScalarType compute_dtype, int shift, int ignore_index, float? softcap, float logit_scale, " \
  "float temperature, bool wants_entropy, bool wants_zbar, bool wants_argmax, bool needs_de, " \
  "bool needs_dc, bool needs_dbias, int schedule, int? max_workspace, int kept_bytes, "        \
  "SymInt? num_valid=None, bool allow_tf32=False, int first_class=0, int total_classes=0, "    \
  "bool de_in_sums=False, bool dc_adds=False"

Operands read_operands(Stack& stack);
Options read_options(Stack& stack);

// The part of a problem that the options say.
Problem problem_of(const Options& options, Upstream upstream);

// One call: the device made current, operands in a layout that the library reads, the plan, and the
// pointers so far.
class Call {
 public:
  Call(Operands operands, const Options& options, Upstream upstream);

  const Plan& plan() const { return *plan_; }
  std::int64_t rows() const { return row_count(plan_->problem); }
  ScalarType stats() const { return stat_type(plan_->problem.compute_type); }
  std::int64_t kept_bytes() const { return plan_->keeps_logits ? plan_->kept_bytes : 0; }

  RowInputs& inputs() { return *inputs_; }
  // Sums the rows' outputs by args.upstream, to a tensor of one.
  Tensor sum_loss(const std::optional<Tensor>& undefined);
  // An uninitialised tensor of the call's device; one of no elements where it is not wanted.
  Tensor make(std::initializer_list<std::int64_t> sizes, ScalarType type, bool wanted = true) const;

  RowTensors make_rows() const { return {operands_.e, rows(), stats(), plan_->problem.wanted}; }
  Tensor make_de() const;
  Tensor make_dc() const;
  // What dC is to be added to.
  Tensor added_dc(const std::optional<Tensor>& given) const;
  Tensor make_dbias() const;
  Workspace scratch(std::int64_t bytes) const { return {operands_.e, bytes}; }

  Args args;

 private:
  Operands operands_;
  OnDevice device_;
  std::shared_ptr<const Plan> plan_;
  std::optional<RowInputs> inputs_;
};

}  // namespace cutloss::binding
