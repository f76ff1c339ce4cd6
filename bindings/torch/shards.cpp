#include "shards.h"

#include <optional>
#include <string>

#include "call.h"
#include "row_tensors.h"

namespace cutloss::binding {
namespace {

DType stat_of(ScalarType type) { return dtype_of(type, "stat_dtype"); }

}  // namespace

void open_statistics(Stack& stack) {
  Operands operands = read_operands(stack);
  const auto before = stack.next<std::int64_t>();
  const spec::Options options = read_options(stack);
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
  stack.put(states);
  stack.put(kept);
}

void empty_states(Stack& stack) {
  const Tensor like = stack.next<Tensor>();
  const auto rows = stack.next<std::int64_t>();
  const DType stat = stat_of(stack.next<ScalarType>());
  const OnDevice here(like);
  const Tensor states = new_tensor(like, {rows, row_state_bytes(stat)}, ScalarType::Byte);
  cutloss::empty_states(here.device(), stat, rows, data(states), here.stream());
  stack.put(states);
}

void close_rows(Stack& stack) {
  const Tensor given = stack.next<Tensor>();
  Tensor targets = stack.next<Tensor>();
  const auto class_weight = stack.next<std::optional<Tensor>>();
  const auto is_right = stack.next<std::optional<Tensor>>();
  const auto before = stack.next<std::int64_t>();
  const auto type = stack.next<ScalarType>();
  LossRows rows;
  rows.type = stat_of(type);
  rows.classes = stack.next<std::int64_t>();
  rows.rows.shift = stack.next<std::int64_t>();
  rows.rows.ignore_index = stack.next<std::int64_t>();
  Wanted wanted;
  wanted.entropy = stack.next<bool>();
  wanted.zbar = stack.next<bool>();
  wanted.argmax = stack.next<bool>();

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
  out.put(stack);
}

}  // namespace cutloss::binding
