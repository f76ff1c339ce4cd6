// The tensors of a call with an entry for each row, or for each class: checked, and kept while the
// library reads them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "convert.h"
#include "device.h"

namespace cutloss::binding {

std::string shape(const Tensor& t);
std::string shape(const std::vector<std::int64_t>& sizes);

class RowInputs {
 public:
  RowInputs(const OnDevice& device, std::int64_t rows, ScalarType stats)
      : device_(device), rows_(rows), stats_(stats) {}

  // (rows) in the stat dtype; null where absent.
  const void* row(const std::optional<Tensor>& tensor, const char* what);
  // (V), whose size is the caller's to check.
  const void* class_weight(const std::optional<Tensor>& tensor);
  // What loss_terms made, or nothing.
  RowGradients terms(const std::optional<Tensor>& terms);
  // One bool of the device; null where absent.
  const bool* flag(const std::optional<Tensor>& undefined);

 private:
  void need_stats(const Tensor& tensor, const char* what) const;

  const OnDevice& device_;
  const std::int64_t rows_;
  const ScalarType stats_;
  std::vector<Tensor> alive_;
};

}  // namespace cutloss::binding
