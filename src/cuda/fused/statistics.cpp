#include "cuda/fused/statistics.h"

namespace cutloss::cuda::fused {
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
  const sm90::Grid& grid = d.statistics_grid;
  sm90::Statistics s;
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
  const std::int64_t entries = sm90::partial_entries(grid, static_cast<int>(d.sizes.block_rows));
  sm90::launch_clear_statistics(s.partials, entries, s.target_logit,
                                first ? static_cast<int>(rows.count) : 0, call.stream);
  sm90::launch_statistics(parts.logits(rows, columns, e, by_position), s, grid, call.stream);
  sm90::Merge merge;
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
  merge.V = static_cast<int>(call.head.classes.count);
  merge.out = parts.rows.wanted_outputs();
  sm90::launch_merge(merge, call.stream);
}

}  // namespace

void make_statistics(Components& parts, RowRange chunk) {
  const Sizes& s = parts.d.sizes;
  sweep(
      Columns{0, parts.call.head.classes.count}, s.slab, chunk, s.block_rows,
      [&](const Block& block) { add_slab(parts, block); }, [](Columns) {});
}

}  // namespace cutloss::cuda::fused
