// The parts of the fused engine: those of the CUDA engines, with the logits' products and the row
// work on them replaced by the kernels of this folder.
#pragma once

#include "cuda/parts.h"
#include "cuda/sm90/layout.h"
#include "cuda/sm90/rows.h"

namespace cutloss::sm90 {

class FusedParts final : public cuda::CudaParts<float> {
 public:
  FusedParts(const Plan& plan, const Args& args, Passes passes, Memory memory, Shape shape);

  void list_rows() override;
  void clear_ignored_outputs() override;
  void begin_statistics(RowRange chunk) override;
  void accumulate_statistics(const Block& block, bool keep) override;
  void finish_statistics(RowRange chunk) override;
  void make_g(const Block& block, bool from_kept) override;
  void accumulate_dbias(const Block& block) override;
  void accumulate_de(const Block& block) override;
  void accumulate_dc(const Block& block) override;
  void store_de(RowRange chunk) override;

 private:
  bool by_rows() const { return plan_.schedule == Schedule::rows; }
  cuda::RowFacts compact_facts() const;
  Listed listed(RowRange rows) const;
  LogitTransform transform(std::int64_t column, std::int64_t entry) const;
  // The product of some rows of the list and some columns; E is given by the caller.
  Logits logits(RowRange rows, Columns columns, const cuda::Matrix& e, bool by_position);
  const float* inv_temperature(std::int64_t entry) const;
  cuda::Matrix packed_e(RowRange chunk);
  // A buffer of a chunk's rows, in the workspace or kept.
  float* row_buffer(std::string_view name) const;
  void* x() const;
  std::int64_t x_stride() const;
  float2* sums() const;
  void make_exponentials(RowRange chunk);
  void make_g_block(const Block& block);
  void sum_targets(RowRange chunk);
  float* target_sums() const;

  const Shape shape_;
};

}  // namespace cutloss::sm90
