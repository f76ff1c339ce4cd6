#include "cuda/fused/statistics.h"

#include <algorithm>

namespace cutloss::cuda::fused {

std::int64_t partial_entries(const Grid& grid, int rows) {
  const int blocks = (rows + grid.block_rows() - 1) / grid.block_rows();
  std::int64_t most = 0;
  // The fewer rows count, the smaller the groups may be. One more of the largest groups only adds
  // entries, so one of the largest numbers of blocks has the most.
  for (int b = std::max(1, blocks - grid.largest_group + 1); b <= blocks; ++b) {
    const TileWalk walk = TileWalk::make(b, 1, grid.clusters(), grid.largest_group);
    std::int64_t entries = 0;
    for (int r = 0; r < walk.runs; ++r) {
      const int end = r + 1 < walk.runs ? walk.run[r + 1].first_block : b;
      entries += std::int64_t{end - walk.run[r].first_block} * grid.block_rows() * grid.slots() *
                 walk.sharers(r);
    }
    most = std::max(most, entries);
  }
  return most;
}

namespace {

void add_slab(Components& parts, const Block& block) {
  const Call& call = parts.call;
  const FusedDecision& d = parts.d;
  const Wanted& wanted = call.p.wanted;
  const RowRange rows = block.rows;
  const Columns columns = block.columns;
  const bool by_position = !d.packs_e_in_forward;
  const Matrix e = by_position ? Matrix{call.args.in.e, call.head.e_row_stride}
                               : parts.operands.packed_e(block.chunk);
  const Grid& grid = d.statistics_grid;
  Statistics s;
  s.all = wanted.entropy || wanted.zbar || wanted.argmax;
  s.partials = {call.buffer<float2>(buffer::kPartials), nullptr, nullptr, grid.block_rows(),
                grid.slots()};
  if (s.all) {
    s.partials.weighted_and_zbar = call.buffer<float2>(buffer::kPartialsMore);
    s.partials.weight_and_argmax = call.buffer<float2>(buffer::kPartialsArgmax);
  }
  const std::int64_t in_chunk = rows.begin - block.chunk.begin;
  s.target_logit = call.buffer<float>(buffer::kTargetLogit) + in_chunk;
  s.class_weight = parts.operands.class_weight(columns.begin);
  const bool first = columns.begin == 0;
  const bool last = columns.begin + columns.count == call.head.classes.count;
  const std::int64_t entries = partial_entries(grid, static_cast<int>(d.sizes.block_rows));
  launch_clear_statistics(s.partials, entries, s.target_logit,
                          first ? static_cast<int>(rows.count) : 0, call.stream);
  parts.d.kernels->statistics(parts.logits(rows, columns, e, by_position), s, grid, call.stream);
  Merge merge;
  merge.list = parts.listed(rows);
  merge.partials = s.partials;
  merge.clusters = grid.clusters();
  merge.largest_group = grid.largest_group;
  merge.all = s.all;
  merge.first_slab = first;
  merge.last_slab = last;
  merge.states =
      d.several_slabs ? call.buffer<RowState<float>>(buffer::kStates) + in_chunk : nullptr;
  merge.target_logit = s.target_logit;
  merge.class_weight = parts.operands.class_weight(0);
  merge.classes = call.head.classes;
  merge.out = parts.rows.wanted_outputs();
  launch_merge(merge, call.stream);
}

}  // namespace

void make_statistics(Components& parts, RowRange chunk) {
  const Sizes& s = parts.d.sizes;
  sweep(
      Columns{0, parts.call.head.classes.count}, s.slab, chunk, s.block_rows,
      [&](const Block& block) { add_slab(parts, block); }, [](Columns) {});
}

}  // namespace cutloss::cuda::fused
