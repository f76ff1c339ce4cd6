// dE, dC and dbias: g of each block multiplied and added up, in the order of the blocks, and what
// becomes of the sums.
#pragma once

#include "cuda/operands.h"
#include "cuda/products.h"

namespace cutloss::cuda {

// g of a block, (rows, columns), in the products' dtype; `scalars` where it carries a scale.
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

  // dE begins with the first columns, dC and dbias with the first rows of the list.
  void add_dbias(const Block& block, const BlockGradient& g) const;
  void add_de(const Block& block, const BlockGradient& g);
  void add_dc(const Block& block, const BlockGradient& g);

  // These columns have seen every row of the list, these rows every column. A chunk's rows are
  // stored once.
  void store_columns(Columns columns) const;
  void store_rows(RowRange chunk);
  // All rows are stored; here are those of dE that predict nothing or are ignored, and NaN where
  // num_valid is wrong. Tells Args::de_event. May come before the last of dC, and comes once.
  void finish_de();
  // The rest: that, dbias, and everything where no row counts.
  void finish();

  // Where dC of some columns accumulates; in the stat dtype unless it is written by one product.
  bool dc_has_sums() const;
  T* dc_sums(Columns columns) const;
  // Whether a block's dC is added to what is there: always where dC is added to, else after the
  // first rows.
  bool adds_to_dc(const Block& block) const {
    return block.rows.begin > 0 || call_.p.wanted.dc.add;
  }
  // dE is stored: its sums have left dC's last rows, which follow.
  void begin_last_columns() { in_last_columns_ = true; }
  // Elements from row to row of a block's g that has a place of its own.
  std::int64_t g_stride() const {
    return padded(in_last_columns_ ? call_.d.last.gradient_slab : call_.d.sizes.gradient_slab,
                  call_.d.operand);
  }

 private:
  // NaN where num_valid is wrong, which the device finds out.
  void poison(void* values, DType type, std::int64_t count) const;

  const Call& call_;
  const ListedRows<T>& rows_;
  Operands<T>& operands_;
  const Products& products_;
  bool in_last_columns_ = false;
  std::int64_t stored_rows_ = -1;  // the chunk's that was stored last begin here
  bool de_is_finished_ = false;
};

// What the sums take in a workspace: dE of `chunk_rows` rows, dC, dbias.
void book_sums(Ledger& ledger, const CudaDecision& d, bool always_de_sums);

extern template class GradientSums<float>;
extern template class GradientSums<double>;

}  // namespace cutloss::cuda
