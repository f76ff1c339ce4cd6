#include "shards.h"

#include <optional>
#include <string>

namespace cutloss::binding {
namespace {

DType stat_of(ScalarType type) { return dtype_of(type, "stat_dtype"); }

}  // namespace

std::tuple<Tensor, Tensor> open_statistics(Operands operands, std::int64_t before,
                                           const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_backward);
  const Plan& plan = call.plan();
  const std::int64_t bytes = row_state_bytes(stat_of(call.stats()));
  const Tensor states = call.make({before + call.rows(), bytes}, ScalarType::Byte);
  const Tensor kept = call.make({call.kept_bytes()}, ScalarType::Byte);
  const Workspace workspace = call.scratch(plan.forward_workspace_bytes);
  if (states.numel() > 0) {
    call.args.rows.state = static_cast<std::byte*>(data(states)) + before * bytes;
  }
  call.args.kept = data(kept);
  call.args.workspace = workspace.data();
  forward(plan, call.args);
  return {states, kept};
}

Tensor empty_states(const Tensor& like, std::int64_t rows, ScalarType stat_dtype) {
  const DType stat = stat_of(stat_dtype);
  const OnDevice here(like);
  const Tensor states = new_tensor(like, {rows, row_state_bytes(stat)}, ScalarType::Byte);
  cutloss::empty_states(here.device(), stat, rows, data(states), here.stream());
  return states;
}

RowTensors close_rows(const Tensor& given, Tensor targets,
                      const std::optional<Tensor>& class_weight,
                      const std::optional<Tensor>& is_right, std::int64_t before, ScalarType type,
                      std::int64_t V, std::int64_t shift, std::int64_t ignore_index,
                      bool wants_entropy, bool wants_zbar, bool wants_argmax) {
  LossRows rows;
  rows.type = stat_of(type);
  rows.classes = V;
  rows.rows.shift = shift;
  rows.rows.ignore_index = ignore_index;
  Wanted wanted;
  wanted.entropy = wants_entropy;
  wanted.zbar = wants_zbar;
  wanted.argmax = wants_argmax;

  const OnDevice here(given, "states");
  rows.device = here.device();
  here.require_here(targets, "targets");
  if (targets.dim() != 2) {
    throw Error(ErrorCode::invalid_value,
                "targets must be (sequences, length), got shape " + shape(targets));
  }
  targets = packed(targets, "targets");
  rows.rows.sequences = targets.size(0);
  rows.rows.length = targets.size(1);
  rows.rows.target_type = index_type_of(targets.scalar_type());
  const std::int64_t count = row_count(rows.rows), bytes = row_state_bytes(rows.type);
  if (given.dim() != 3 || given.size(1) != before + count || given.size(2) != bytes ||
      given.scalar_type() != ScalarType::Byte) {
    throw Error(ErrorCode::invalid_value,
                "states must be (shards, " + std::to_string(before + count) + ", " +
                    std::to_string(bytes) + ") bytes, got shape " + shape(given));
  }
  const Tensor states = packed(given, "states");
  RowInputs inputs(here, count, type);
  if (class_weight && class_weight->numel() != rows.classes) {
    throw Error(ErrorCode::invalid_value, "class_weight must be (" + std::to_string(rows.classes) +
                                              "), got shape " + shape(*class_weight));
  }
  const RowTensors out(states, count, type, wanted);
  RowStates s;
  s.states = count > 0 ? static_cast<std::byte*>(data(states)) + before * bytes : nullptr;
  s.count = states.size(0);
  s.stride = before + count;
  s.targets = targets.const_data_ptr();
  s.class_weight = inputs.class_weight(class_weight);
  s.is_right = inputs.flag(is_right);
  cutloss::close_rows(rows, s, out.outputs(), here.stream());
  return out;
}

}  // namespace cutloss::binding
