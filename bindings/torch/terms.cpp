#include "terms.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "device.h"

namespace cutloss::binding {
namespace {

// Weights as the library reads them; null where absent. `kept` holds what it points to.
const void* weights(const OnDevice& here, const std::optional<Tensor>& given, std::int64_t count,
                    ScalarType type, const char* what, std::optional<Tensor>& kept) {
  if (!given) return nullptr;
  if (given->numel() != count || given->scalar_type() != type) {
    throw Error(ErrorCode::invalid_value,
                std::string(what) + " must have " + std::to_string(count) + " elements of " +
                    torch::headeronly::toString(type) + ", got " + std::to_string(given->numel()) +
                    " of " + torch::headeronly::toString(given->scalar_type()));
  }
  here.require_here(*given, what);
  kept = packed(*given, what);
  return kept->const_data_ptr();
}

}  // namespace

void loss_terms(Stack& stack) {
  Tensor targets = stack.next<Tensor>();
  const auto token_weight = stack.next<std::optional<Tensor>>();
  const auto class_weight = stack.next<std::optional<Tensor>>();
  const auto compute = stack.next<ScalarType>();
  LossRows rows;
  rows.classes = stack.next<std::int64_t>();
  rows.rows.shift = stack.next<std::int64_t>();
  rows.rows.ignore_index = stack.next<std::int64_t>();
  Weighting weighting;
  weighting.mean = stack.next<bool>();
  weighting.label_smoothing = stack.next<double>();
  weighting.z_loss = stack.next<double>();

  if (targets.dim() != 2) {
    throw Error(ErrorCode::invalid_value, "targets must be (sequences, length), got " +
                                              std::to_string(targets.dim()) + " dimensions");
  }
  const OnDevice here(targets, "targets");
  targets = packed(targets, "targets");
  rows.device = here.device();
  rows.rows.sequences = targets.size(0);
  rows.rows.length = targets.size(1);
  rows.rows.target_type = index_type_of(targets.scalar_type());
  const DType compute_type = dtype_of(compute, "compute_dtype");
  rows.type = compute_type == DType::f64 ? DType::f64 : DType::f32;
  const ScalarType type = stat_type(compute_type);
  std::optional<Tensor> alive[2];
  weighting.token_weight =
      weights(here, token_weight, targets.numel(), type, "token_weight", alive[0]);
  weighting.class_weight =
      weights(here, class_weight, rows.classes, type, "class_weight", alive[1]);

  const std::int64_t count = row_count(rows.rows);
  const TermOrder order(weighting.label_smoothing > 0, weighting.z_loss > 0);
  const Tensor made = new_tensor(targets, {order.count, count}, type);
  const Tensor undefined = new_tensor(targets, {}, ScalarType::Bool);
  auto* first = static_cast<std::byte*>(made.mutable_data_ptr());
  const auto row = [&](int at) -> void* {
    return at < 0 ? nullptr : first + at * count * made.element_size();
  };
  const LossTerms terms{row(order.nll), row(order.lse), row(order.lse_squared), row(order.zbar),
                        static_cast<bool*>(undefined.mutable_data_ptr())};
  cutloss::loss_terms(rows, weighting, targets.const_data_ptr(), terms, here.stream());
  stack.put(made);
  stack.put(undefined);
}

}  // namespace cutloss::binding
