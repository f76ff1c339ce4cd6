#include "terms.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "row_inputs.h"

namespace cutloss::binding {
namespace {

// Weights of a shape as the library reads them; null where absent. `kept` holds what it points to.
const void* weights(const OnDevice& here, const std::optional<Tensor>& given,
                    const std::vector<std::int64_t>& sizes, ScalarType type, const char* what,
                    std::optional<Tensor>& kept) {
  if (!given) return nullptr;
  bool agrees = given->dim() == static_cast<std::int64_t>(sizes.size());
  for (std::size_t i = 0; agrees && i < sizes.size(); ++i) {
    agrees = given->size(static_cast<std::int64_t>(i)) == sizes[i];
  }
  if (!agrees) {
    throw Error(ErrorCode::invalid_value, std::string(what) + " must have the shape " +
                                              shape(sizes) + ", got " + shape(*given));
  }
  if (given->scalar_type() != type) {
    throw Error(ErrorCode::invalid_type, std::string(what) + " must be " +
                                             torch::headeronly::toString(type) + ", got " +
                                             torch::headeronly::toString(given->scalar_type()));
  }
  here.require_here(*given, what);
  kept = packed(*given, what);
  return kept->const_data_ptr();
}

}  // namespace

Terms make_terms(const LossRows& rows, const WeightTensors& tensors, const RowWeights& given,
                 const Tensor& targets) {
  const OnDevice here(targets, "targets");
  const ScalarType type = rows.type == DType::f64 ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> alive[2];
  Weighting weighting;
  weighting.mean = given.mean;
  weighting.label_smoothing = given.label_smoothing;
  weighting.z_loss = given.z_loss;
  weighting.token_weight = weights(here, tensors.of_tokens, {targets.size(0), targets.size(1)},
                                   type, "token_weight", alive[0]);
  weighting.class_weight =
      weights(here, tensors.of_classes, {rows.classes}, type, "class_weight", alive[1]);

  const std::int64_t count = row_count(rows.rows);
  const TermOrder order(weighting.label_smoothing > 0, weighting.z_loss > 0);
  Terms made;
  made.terms = new_tensor(targets, {order.count, count}, type);
  made.undefined = new_tensor(targets, {}, ScalarType::Bool);
  auto* first = static_cast<std::byte*>(made.terms.mutable_data_ptr());
  const auto row = [&](int at) -> void* {
    return at < 0 ? nullptr : first + at * count * made.terms.element_size();
  };
  const LossTerms terms{row(order.nll), row(order.lse), row(order.lse_squared), row(order.zbar),
                        static_cast<bool*>(made.undefined.mutable_data_ptr())};
  cutloss::loss_terms(rows, weighting, targets.const_data_ptr(), terms, here.stream());
  return made;
}

Terms loss_terms(Tensor targets, const WeightTensors& tensors, ScalarType compute, std::int64_t V,
                 std::int64_t shift, std::int64_t ignore_index, const RowWeights& weights) {
  if (targets.dim() != 2) {
    throw Error(ErrorCode::invalid_value, "targets must be (sequences, length), got " +
                                              std::to_string(targets.dim()) + " dimensions");
  }
  targets = packed(targets, "targets");
  LossRows rows;
  rows.classes = V;
  rows.rows.shift = shift;
  rows.rows.ignore_index = ignore_index;
  rows.device = targets.is_cuda() ? Device::cuda : Device::cpu;
  rows.rows.sequences = targets.size(0);
  rows.rows.length = targets.size(1);
  rows.rows.target_type = index_type_of(targets.scalar_type());
  rows.type = dtype_of(compute, "compute_dtype") == DType::f64 ? DType::f64 : DType::f32;
  return make_terms(rows, tensors, weights, targets);
}

}  // namespace cutloss::binding
