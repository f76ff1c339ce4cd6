// The parts of the CUDA engines. A fused engine derives from them and replaces some: what it may
// use is protected.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "core/dtype.h"
#include "core/engine.h"
#include "cuda/common/kernels.h"
#include "cuda/cublaslt.h"
#include "cuda/layout.h"

namespace cutloss::cuda {

// A matrix in device memory, ready for a product; its stride in elements.
struct Matrix {
  const void* data = nullptr;
  std::int64_t stride = 0;
};

// The address `elements` past a base.
inline const void* at(const void* base, DType type, std::int64_t elements) {
  return static_cast<const std::byte*>(base) + elements * size_of(type);
}
inline void* at(void* base, DType type, std::int64_t elements) {
  return static_cast<std::byte*>(base) + elements * size_of(type);
}

// T: the stat dtype, float or double.
template <class T>
class CudaParts : public Parts {
 public:
  // The layouts' buffers are those of workspace_needs and kept_needs, and whatever a derived
  // engine adds.
  struct Memory {
    Layout workspace, kept;
    Room room;
  };
  CudaParts(const Plan& plan, const Args& args, Passes passes, Memory memory);

  void list_rows() override;
  std::int64_t rows_to_cover() const override;
  RowList list(RowRange rows) const override;
  void begin_statistics(RowRange chunk) override;
  void accumulate_statistics(const Block& block, bool keep) override;
  void finish_statistics(RowRange chunk) override;
  void clear_ignored_outputs() override;
  void make_g(const Block& block, bool from_kept) override;
  void accumulate_dbias(const Block& block) override;
  void accumulate_de(const Block& block) override;
  void accumulate_dc(const Block& block) override;
  void store_dc(Columns columns) override;
  void store_de(RowRange chunk) override;
  void finish_gradients() override;
  void sum_loss(void* loss, const bool* undefined) override;

 protected:
  const Plan& plan_;
  const Problem& p_;
  const Head& head_;
  const Args& args_;
  const Passes passes_;
  const Memory memory_;
  const Traits traits_;
  const DType operand_;
  const cudaStream_t stream_;
  RowTable table_;

  // A buffer of the workspace; null where the layout has none of that name.
  template <class U>
  U* buffer(std::string_view name) const {
    const Layout& layout = memory_.workspace;
    if (!layout.has(name)) return nullptr;
    return reinterpret_cast<U*>(static_cast<std::byte*>(args_.workspace) + layout.offset(name));
  }

  std::int64_t row_count_() const { return row_count(p_); }
  RowFacts row_facts() const;
  Places places(std::int64_t first) const;
  // What is not wanted is not written, even where there is room for it.
  RowOutputs wanted_outputs() const;

  const T* bias(std::int64_t column) const;
  const T* class_weight(std::int64_t column) const;
  T softcap() const { return static_cast<T>(p_.transform.softcap.value_or(0)); }

  // E of some rows of a chunk, C of some columns (at most room.c_columns, where C is converted).
  Matrix load_rows(RowRange rows, RowRange chunk);
  Matrix load_columns(Columns columns);
  std::int64_t most_columns() const;

  // Adds type, workspace and tf32, and runs it.
  void multiply(Product product) const;
  void multiply_logits(const Matrix& e, const Matrix& c, std::int64_t rows, std::int64_t columns,
                       T* z) const;
  // alpha of the gradients' products: logit_scale, and g's own scale where it has one.
  void set_gradient_scale(Product& product) const;

  // Coefficients of the chunk's rows: made once in a call; those of a row.
  const RowGradient<T>* coefficients(RowRange chunk, std::int64_t row);

  Kept<T> kept(std::int64_t row_in_chunk, std::int64_t column) const;
  // g of the last block.
  void* g_ = nullptr;
  std::int64_t g_stride_ = 0;

  T* de_sums(RowRange chunk) const;
  T* dc_sums(Columns columns) const;

  void copy_flat(const void* from, DType from_type, void* to, DType to_type,
                 std::int64_t count) const;

  void load_bias();
  void convert_columns(Columns columns);
  RowRange loaded_rows_{-1, 0};  // of E, packed

 private:
  LogitBlock<T> logit_block(T* z, std::int64_t stride, RowRange rows, Columns columns) const;

  Columns loaded_columns_{-1, 0};
  RowRange coefficients_of_{-1, 0};
};

extern template class CudaParts<float>;
extern template class CudaParts<double>;

}  // namespace cutloss::cuda
