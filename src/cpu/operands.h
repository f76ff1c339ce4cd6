// E, C and the bias as the products and the row work read them: where they lie, or converted.
#pragma once

#include "core/matrix.h"
#include "cpu/rows/listed_rows.h"
#include "cpu/rows/row_ops.h"

namespace cutloss::cpu {

template <class T>
class Operands {
 public:
  Operands(const Call& call, const ListedRows<T>& rows) : call_(call), rows_(rows) {}

  // E of some entries of the list, (rows, D): where it lies if its rows are evenly spaced and have
  // the products' dtype, else gathered and converted. Valid until the next call for other rows.
  Matrix e(RowRange rows);
  // C of some columns, (columns, D). Valid until the next call for other columns.
  Matrix c(Columns columns);
  // The transform of the logits of row n.
  RowTransform<T> transform(std::int64_t n, Columns columns);
  // The weights of the columns, or null for 1.
  const T* class_weight(Columns columns) const;
  // The bias of the columns in the stat dtype, or null. The first call converts all of it.
  const T* bias(Columns columns);
  // Writes z = logit_scale E C^T of a block, packed.
  void multiply_logits(const Block& block, T* z);

 private:
  const Call& call_;
  const ListedRows<T>& rows_;
  RowRange e_rows_{-1, 0};
  Columns c_columns_{-1, 0};
  bool has_bias_ = false;
};

extern template class Operands<float>;
extern template class Operands<double>;

}  // namespace cutloss::cpu
