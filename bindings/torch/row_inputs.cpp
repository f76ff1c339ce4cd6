#include "row_inputs.h"

#include "terms.h"

namespace cutloss::binding {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_value, message);
}

}  // namespace

std::string shape(const std::vector<std::int64_t>& sizes) {
  std::string out = "(";
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    out += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  }
  return out + ")";
}

std::string shape(const Tensor& t) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return shape(sizes);
}

void RowInputs::need_stats(const Tensor& tensor, const char* what) const {
  if (tensor.scalar_type() == stats_) return;
  throw Error(ErrorCode::invalid_type, std::string(what) + " must be " +
                                           torch::headeronly::toString(stats_) +
                                           ", the dtype of per-row outputs, got " +
                                           torch::headeronly::toString(tensor.scalar_type()));
}

const void* RowInputs::row(const std::optional<Tensor>& tensor, const char* what) {
  if (!tensor) return nullptr;
  if (tensor->dim() != 1 || tensor->size(0) != rows_) {
    refuse(std::string(what) + " must be (" + std::to_string(rows_) + "), got shape " +
           shape(*tensor));
  }
  need_stats(*tensor, what);
  device_.require_here(*tensor, what);
  alive_.push_back(packed(*tensor, what));
  return alive_.back().const_data_ptr();
}

const void* RowInputs::class_weight(const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  need_stats(*tensor, "class_weight");
  device_.require_here(*tensor, "class_weight");
  alive_.push_back(packed(*tensor, "class_weight"));
  return alive_.back().const_data_ptr();
}

RowGradients RowInputs::terms(const std::optional<Tensor>& terms) {
  RowGradients gradients;
  if (!terms) return gradients;
  const std::int64_t count = terms->dim() == 2 ? terms->size(0) : 0;
  if (count < 1 || count > 4 || terms->size(1) != rows_ || terms->scalar_type() != stats_) {
    refuse("terms must be what loss_terms makes of " + std::to_string(rows_) + " rows, got shape " +
           shape(*terms) + " of " + torch::headeronly::toString(terms->scalar_type()));
  }
  device_.require_here(*terms, "terms");
  alive_.push_back(packed(*terms, "terms"));
  const auto* data = static_cast<const std::byte*>(alive_.back().const_data_ptr());
  const TermOrder order(count);
  const auto row = [&](int at) -> const void* {
    return at < 0 ? nullptr : data + at * rows_ * terms->element_size();
  };
  gradients.d_nll = row(order.nll);
  gradients.d_lse = row(order.lse);
  gradients.d_zbar = row(order.zbar);
  gradients.d_lse_squared = row(order.lse_squared);
  return gradients;
}

const bool* RowInputs::flag(const std::optional<Tensor>& undefined) {
  if (!undefined) return nullptr;
  if (undefined->numel() != 1 || undefined->scalar_type() != ScalarType::Bool) {
    refuse("undefined must be one bool, got shape " + shape(*undefined) + " of " +
           torch::headeronly::toString(undefined->scalar_type()));
  }
  device_.require_here(*undefined, "undefined");
  return static_cast<const bool*>(undefined->const_data_ptr());
}

}  // namespace cutloss::binding
