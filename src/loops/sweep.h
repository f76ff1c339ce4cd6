// The order in which an algorithm passes over a chunk of rows and all columns.
#pragma once

#include <algorithm>

#include "core/ranges.h"

namespace cutloss {

// Slabs of columns outside, blocks of rows inside: what a slab needs prepared (C in the products'
// dtype, dC's accumulator) is prepared once. Calls on_block(Block) for each block and
// after_slab(Columns) when a slab has seen every row of the chunk.
template <class OnBlock, class AfterSlab>
void sweep(std::int64_t V, std::int64_t slab, RowRange chunk, std::int64_t block_rows,
           OnBlock on_block, AfterSlab after_slab) {
  if (chunk.count == 0) return;
  const std::int64_t end = chunk.begin + chunk.count;
  for (std::int64_t v = 0; v < V; v += slab) {
    const Columns columns{v, std::min(slab, V - v)};
    for (std::int64_t n = chunk.begin; n < end; n += block_rows) {
      on_block(Block{chunk, {n, std::min(block_rows, end - n)}, columns});
    }
    after_slab(columns);
  }
}

}  // namespace cutloss
