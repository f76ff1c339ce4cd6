#include "schedule/sweep.h"

#include <algorithm>

namespace cutloss {
namespace {

// Slabs outside, rows inside: what a slab needs prepared (C in the products' dtype, dC's
// accumulator) is prepared once.
template <class OnBlock, class AfterSlab>
void sweep(std::int64_t V, std::int64_t slab, RowRange chunk, std::int64_t block_rows,
           OnBlock on_block, AfterSlab after_slab) {
  const std::int64_t end = chunk.begin + chunk.count;
  for (std::int64_t v = 0; v < V; v += slab) {
    const Columns columns{v, std::min(slab, V - v)};
    for (std::int64_t n = chunk.begin; n < end; n += block_rows) {
      on_block(Block{chunk, {n, std::min(block_rows, end - n)}, columns});
    }
    after_slab(columns);
  }
}

}  // namespace

RowRange rows_of_chunk(const Plan& plan, const Parts& parts, std::int64_t chunk) {
  const std::int64_t rows = parts.rows_to_cover();
  if (plan.schedule != Schedule::rows || plan.chunk_rows == 0) return {0, chunk == 0 ? rows : 0};
  const std::int64_t begin = std::min(chunk * plan.chunk_rows, rows);
  return {begin, std::min(plan.chunk_rows, rows - begin)};
}

void sweep_statistics(const Plan& plan, Parts& parts, RowRange chunk, bool keep) {
  if (chunk.count == 0) return;
  parts.begin_statistics(chunk);
  sweep(
      classes_of(plan.problem).count, plan.slab, chunk, plan.block_rows,
      [&](const Block& block) { parts.accumulate_statistics(block, keep); }, [](Columns) {});
  parts.finish_statistics(chunk);
}

void sweep_gradients(const Plan& plan, Parts& parts, RowRange chunk, bool from_kept) {
  if (chunk.count == 0) return;
  const Problem& p = plan.problem;
  const bool last_chunk = chunk.begin + chunk.count == parts.rows_to_cover();
  sweep(
      classes_of(p).count, plan.gradient_slab, chunk, plan.gradient_rows,
      [&](const Block& block) {
        parts.make_g(block, from_kept);
        if (p.wanted.dbias.wanted) parts.accumulate_dbias(block);
        if (p.wanted.de.wanted) parts.accumulate_de(block);
        if (p.wanted.dc.wanted) parts.accumulate_dc(block);
      },
      [&](Columns columns) {
        if (p.wanted.dc.wanted && last_chunk) parts.store_dc(columns);
      });
  if (p.wanted.de.wanted) parts.store_de(chunk);
}

}  // namespace cutloss
