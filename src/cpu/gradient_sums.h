// Makes dE, dC and dbias: multiplies g of each block, adds it up in the order of the blocks, and
// stores the sums.
#pragma once

#include "cpu/operands.h"
#include "loops/sweep.h"

namespace cutloss::cpu {

template <class T>
class GradientSums {
 public:
  GradientSums(const Call& call, const ListedRows<T>& rows, Operands<T>& operands)
      : call_(call), rows_(rows), operands_(operands) {}

  // Adds a block's g, (rows, columns) packed. dE's sums begin anew with the first columns, those of
  // dC and dbias with the first rows of the list.
  void add(const Block& block, const void* g, Which which);
  // Stores dC of columns that have seen every row of the list.
  void store_columns(Columns columns);
  // Stores dE of rows that have seen every column.
  void store_rows(RowRange chunk);
  // Writes the rest: rows that predict nothing or are ignored, dbias, and everything where no row
  // counts.
  void finish();

 private:
  void add_dbias(const Block& block, const void* g);
  void add_de(const Block& block, const void* g);
  void add_dc(const Block& block, const void* g);
  bool one_product_makes_dc() const;
  T* dc_sums(Columns columns) const;
  void store_dbias(bool no_rows) const;
  void spread_de() const;
  void clear_unpredicted_de() const;

  const Call& call_;
  const ListedRows<T>& rows_;
  Operands<T>& operands_;
};

extern template class GradientSums<float>;
extern template class GradientSums<double>;

}  // namespace cutloss::cpu
