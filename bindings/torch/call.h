// The tensors that all operators share, read from the stack, and what becomes of a call.
#pragma once

#include <memory>
#include <optional>

#include "convert.h"
#include "device.h"
#include "option_reader.h"
#include "row_inputs.h"
#include "row_tensors.h"
#include "terms.h"

namespace cutloss::binding {

// The tensors that describe the loss, first in every schema. E is (sequences, length, D).
struct Operands {
  Tensor e;
  Tensor c;
  std::optional<Tensor> bias;
  Tensor targets;
  std::optional<Tensor> row_temperature;
  std::optional<Tensor> class_weight;

  static Operands read(Stack& stack);
};

#define CUTLOSS_OPERANDS                                                                \
  "Tensor e, Tensor c, Tensor? bias, Tensor targets, Tensor? row_temperature, Tensor? " \
  "class_weight"

// One call: the device made current, operands in a layout that the library reads, the plan, and the
// pointers so far.
class Call {
 public:
  Call(Operands operands, const spec::Options& options, Upstream upstream);

  const Plan& plan() const { return *plan_; }
  std::int64_t rows() const { return row_count(plan_->problem); }
  ScalarType stats() const { return stat_type(plan_->problem.compute_type); }
  std::int64_t kept_bytes() const { return plan_->keeps_logits ? plan_->kept_bytes : 0; }

  RowInputs& inputs() { return *inputs_; }
  // Sums the rows' outputs by args.upstream, to a tensor of one.
  Tensor sum_loss(const std::optional<Tensor>& undefined);
  // An uninitialised tensor of the call's device; one of no elements where it is not wanted.
  Tensor make(std::initializer_list<std::int64_t> sizes, ScalarType type, bool wanted = true) const;

  Terms make_terms(const WeightTensors& tensors, const RowWeights& weights) const;

  // For results that nobody is shown but for argmax.
  RowsInOne make_rows_in_one() const {
    return {operands_.e, rows(), stats(), plan_->problem.wanted};
  }
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
