// Makes dE, dC and dbias: multiplies g of each block, adds it up in the order of the blocks, and
// stores the sums.
#pragma once

#include "cuda/operands.h"
#include "cuda/products.h"

namespace cutloss::cuda {

// g of a block, (rows, columns), in the products' dtype. `scalars` is null where it carries no
// scale.
struct BlockGradient {
  void* data = nullptr;
  std::int64_t stride = 0;
  const DeviceScalars* scalars = nullptr;
};

template <class T>
class GradientSums {
 public:
  GradientSums(const Call& call, const ListedRows<T>& rows, Operands<T>& operands,
               const Products& products)
      : call_(call), rows_(rows), operands_(operands), products_(products) {}

  // Each adds a block's part to its sums. dE's begin anew with the first columns, those of dC and
  // dbias with the first rows of the list.
  void add_dbias(const Block& block, const BlockGradient& g) const;
  void add_de(const Block& block, const BlockGradient& g);
  void add_dc(const Block& block, const BlockGradient& g);

  // Store dC of columns that have seen every row of the list, and dE of rows that have seen every
  // column.
  void store_columns(Columns columns) const;
  void store_rows(RowRange chunk) const;
  // Writes the rest: rows that predict nothing or are ignored, dbias, everything where no row
  // counts, and NaN where num_valid is wrong.
  void finish() const;

  // Whether dC has sums of its own, and where dC of some columns accumulates.
  bool dc_has_sums() const;
  T* dc_sums(Columns columns) const;
  // Whether a block's dC is added to what is there: always where dC is added to, else after the
  // first rows.
  bool adds_to_dc(const Block& block) const {
    return block.rows.begin > 0 || call_.p.wanted.dc.add;
  }
  // Notes that dE is stored: its sums have left dC's last rows, which are made next.
  void begin_last_columns() { in_last_columns_ = true; }
  // How many elements lie from row to row in a block's g that has a place of its own.
  std::int64_t g_stride() const {
    return padded(in_last_columns_ ? call_.d.last.gradient_slab : call_.d.sizes.gradient_slab,
                  call_.d.operand);
  }

 private:
  const Call& call_;
  const ListedRows<T>& rows_;
  Operands<T>& operands_;
  const Products& products_;
  bool in_last_columns_ = false;
};

// Books the sums of dE, dC and dbias in a workspace.
void book_sums(Ledger& ledger, const CudaDecision& d, bool always_de_sums);

extern template class GradientSums<float>;
extern template class GradientSums<double>;

}  // namespace cutloss::cuda
