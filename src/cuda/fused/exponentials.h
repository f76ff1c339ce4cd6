// By rows with reference exponents (docs/math.md): what the logits' kernel stores of a chunk is
// x = e^(z - reference) times the softcap's slope. g is x times a factor of the row, known after
// the statistics, and the factor goes into the other operand of each product; only the target,
// which x leaves out, is added apart.
#pragma once

#include "cuda/fused/components.h"

namespace cutloss::cuda::fused {

class ExponentialsSession : public FusedSession {
 public:
  using FusedSession::FusedSession;

 protected:
  // x of a chunk, and its statistics.
  void make_statistics(std::int64_t chunk) override;
  // Its gradients, in this order: dbias, dC with the targets' sums, which lie where dE's sums will
  // be, and dE.
  void make_gradients(std::int64_t chunk) override;

 private:
  void make_factors(RowRange chunk);
  void scale_e(RowRange chunk);
  void add_dbias(RowRange chunk);
  void add_dc(RowRange chunk);
  void make_de(RowRange chunk);
  void sum_targets(RowRange chunk);

  Columns all_columns() const { return {0, parts.call.head.classes.count}; }
  // Target logits and reference exponents: kept with x, or in the workspace.
  float* row_buffer(std::string_view name) const;
  void* x() const { return parts.call.kept<void>(buffer::kX); }
  std::int64_t x_stride() const { return padded(parts.call.head.classes.count, DType::bf16); }
  float* target_sums() const { return parts.call.buffer<float>(buffer::kTargetSums); }
};

}  // namespace cutloss::cuda::fused
