// The order in which an algorithm passes over a chunk of rows and some columns.
#pragma once

#include <algorithm>

#include "core/ranges.h"
#include "plan/decision.h"

namespace cutloss {

// Passes over slabs of columns, and within each over blocks of rows, so that what a slab needs (C
// in the products' dtype, dC's accumulator) is prepared once. Calls on_block(Block) for each block
// and after_slab(Columns) when a slab has seen every row of the chunk.
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

// Which gradients of a block are made.
struct Which {
  bool de = true;
  // dC and dbias.
  bool dc = true;
};

// Makes the gradients of a chunk, over an engine's components: calls add(Block, Which) for each
// block, and stores what has seen every row or every column. Where dE's sums wait in dC's last rows
// (LastColumns), those columns come twice, and end_of_sums() is called when the sums have left.
template <class Parts, class Add, class EndOfSums>
void sweep_gradients(Parts& parts, RowRange chunk, Add add, EndOfSums end_of_sums) {
  const Decision& d = parts.call.d;
  const Sizes& s = d.sizes;
  const bool last_chunk = chunk.begin + chunk.count == parts.rows.to_cover();
  const auto store_columns = [&](Columns columns) {
    if (last_chunk) parts.sums.store_columns(columns);
  };
  const Columns first{0, d.last.begin};
  const Columns last{d.last.begin, classes_of(d.problem).count - d.last.begin};
  sweep(
      first, s.gradient_slab, chunk, s.gradient_rows,
      [&](const Block& block) { add(block, Which{}); }, store_columns);
  sweep(
      last, s.gradient_slab, chunk, s.gradient_rows,
      [&](const Block& block) {
        add(block, Which{true, false});
      },
      [](Columns) {});
  parts.sums.store_rows(chunk);
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
