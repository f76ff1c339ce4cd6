// Makes g of a block: dLoss/dlogit before scale and bias, (rows, columns), packed, in the products'
// dtype.
#pragma once

#include "cpu/kept_logits.h"
#include "cpu/operands.h"

namespace cutloss::cpu {

template <class T>
class GradientRows {
 public:
  GradientRows(const Call& call, const ListedRows<T>& rows, Operands<T>& operands)
      : call_(call), rows_(rows), operands_(operands) {}

  // Makes g from what was kept of the block's logits.
  const void* from_kept(const Block& block, const KeptLogits<T>& kept);
  // Makes g from the block's logits, which are made once more.
  const void* from_product(const Block& block);

 private:
  GradientRow<T> row(std::int64_t n, Columns columns) const;

  const Call& call_;
  const ListedRows<T>& rows_;
  Operands<T>& operands_;
};

extern template class GradientRows<float>;
extern template class GradientRows<double>;

}  // namespace cutloss::cpu
