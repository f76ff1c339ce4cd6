// The components that the sessions of cuda/library are made of.
#pragma once

#include <memory>
#include <utility>

#include "cuda/gradient_sums.h"
#include "cuda/library/decision.h"
#include "cuda/library/kernels.h"
#include "cuda/rows/chunk_coefficients.h"
#include "loops/sweep.h"

namespace cutloss::cuda::library {

// T is the stat dtype.
template <class T>
struct Components {
  Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : call(std::move(decision), args, pass),
        rows(call),
        operands(call, rows),
        products(call),
        coefficients(call, rows, operands),
        sums(call, rows, operands, products) {}

  void begin();
  // Makes the statistics of a chunk whose logits are kept or forgotten.
  void make_statistics(RowRange chunk, bool keep);
  // Makes the gradients of a chunk, from what was kept of its logits or from logits that are made
  // once more.
  void make_gradients(RowRange chunk, bool from_kept);

  const Call call;
  ListedRows<T> rows;
  Operands<T> operands;
  Products products;
  ChunkCoefficients<T> coefficients;
  GradientSums<T> sums;

 private:
  void add_statistics(const Block& block, bool keep);
  BlockGradient from_kept_logits(const Block& block);
  BlockGradient from_product(const Block& block);
  BlockGradient place_of_g(const Block& block) const;
  SlabGradient<T> slab_gradient(const Block& block, const BlockGradient& g);
  LogitBlock<T> logit_block(T* z, std::int64_t stride, RowRange rows, Columns columns) const;
  Kept<T> kept(std::int64_t row_in_chunk, std::int64_t column) const;
};

extern template struct Components<float>;
extern template struct Components<double>;

}  // namespace cutloss::cuda::library
