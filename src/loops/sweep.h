// The order in which an algorithm passes over a chunk of rows and some columns.
#pragma once

#include <algorithm>

#include "core/ranges.h"
#include "plan/decision.h"

namespace cutloss {

// Slabs of columns outside, blocks of rows inside: what a slab needs prepared (C in the products'
// dtype, dC's accumulator) is prepared once. Calls on_block(Block) for each block and
// after_slab(Columns) when a slab has seen every row of the chunk.
template <class OnBlock, class AfterSlab>
void sweep(Columns all, std::int64_t slab, RowRange chunk, std::int64_t block_rows,
           OnBlock on_block, AfterSlab after_slab) {
  const std::int64_t end = chunk.begin + chunk.count;
  for (std::int64_t v = all.begin; v < all.begin + all.count; v += slab) {
    const Columns columns{v, std::min(slab, all.begin + all.count - v)};
    for (std::int64_t n = chunk.begin; n < end; n += block_rows) {
      on_block(Block{chunk, {n, std::min(block_rows, end - n)}, columns});
    }
    after_slab(columns);
  }
}

// The gradients of a chunk: add(Block, Which) for each block, store_columns(Columns) when a slab
// has seen every row of the chunk, and store_rows() when the rows have seen every column. Where
// dE's sums wait in dC's last rows (LastColumns), those columns come twice, and end_of_sums() is
// called when the sums have left.
struct Which {
  bool de = true;
  // dC and dbias.
  bool dc = true;
};
template <class Add, class StoreColumns, class StoreRows, class EndOfSums>
void sweep_gradients(const Decision& d, RowRange chunk, Add add, StoreColumns store_columns,
                     StoreRows store_rows, EndOfSums end_of_sums) {
  const Sizes& s = d.sizes;
  const Columns first{0, d.last.begin};
  const Columns last{d.last.begin, classes_of(d.problem).count - d.last.begin};
  const auto nothing = [](Columns) {};
  sweep(
      first, s.gradient_slab, chunk, s.gradient_rows,
      [&](const Block& block) { add(block, Which{}); }, store_columns);
  sweep(
      last, s.gradient_slab, chunk, s.gradient_rows,
      [&](const Block& block) {
        add(block, Which{true, false});
      },
      nothing);
  store_rows();
  if (last.count == 0) return;
  end_of_sums();
  sweep(
      last, d.last.gradient_slab, chunk, d.last.gradient_rows,
      [&](const Block& block) {
        add(block, Which{false, true});
      },
      store_columns);
}

}  // namespace cutloss
