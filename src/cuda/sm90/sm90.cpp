#include "cuda/sm90/sm90.h"

#include <algorithm>

#include "cuda/sm90/instances.h"

namespace cutloss::sm90 {
namespace {

constexpr int kTileColumns = 192;
// Row blocks (of 256 rows) that pass down the vocabulary together: 6 to 11 are alike, and of 6 the
// rows of E fit in L2 many times over.
constexpr int kLargestGroup = 6;

}  // namespace

int column_tiles(std::int64_t columns) {
  return static_cast<int>((columns + kTileColumns - 1) / kTileColumns);
}

Grid grid_for(int multiprocessors, int rows, int columns, bool may_share_rows) {
  Grid grid;
  grid.blocks = multiprocessors / 2 * 2;
  grid.largest_group = kLargestGroup;
  if (rows > 128 || !may_share_rows) return grid;
  // Few rows: the time is that of reading C. Tiles just narrow enough that all blocks get equally
  // many.
  grid.shares_rows = true;
  const int tiles = (columns + kTileColumns * grid.blocks - 1) / (kTileColumns * grid.blocks);
  const int width = (columns + tiles * grid.blocks - 1) / (tiles * grid.blocks);
  grid.width = (width + 7) / 8 * 8;
  return grid;
}

std::int64_t partial_entries(const Grid& grid, int rows) {
  const int blocks = (rows + grid.block_rows() - 1) / grid.block_rows();
  std::int64_t most = 0;
  // The fewer rows count, the smaller the groups may be. One more of the largest groups only adds
  // entries, so the last numbers of blocks hold the most.
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

void launch_statistics(const Logits& logits, const Statistics& statistics, const Grid& grid,
                       cudaStream_t stream) {
  const auto launch = [&]<class Element>(Element*) {
    const auto instance =
        grid.shares_rows ? (statistics.all ? launch_statistics_instance<Element, true, true>
                                           : launch_statistics_instance<Element, true, false>)
                         : (statistics.all ? launch_statistics_instance<Element, false, true>
                                           : launch_statistics_instance<Element, false, false>);
    instance(logits, statistics, grid, stream);
  };
  if (logits.type == DType::f16) {
    launch(static_cast<cute::half_t*>(nullptr));
  } else {
    launch(static_cast<cute::bfloat16_t*>(nullptr));
  }
}

void launch_gradient(const Logits& logits, const GradientOfLogits& gradient, const Grid& grid,
                     cudaStream_t stream) {
  const auto launch = [&]<class Element>(Element*) {
    using Kind = GradientKind;
    const bool capped = logits.transform.softcap != 0.f;
    const auto instance = gradient.general
                              ? (capped ? launch_gradient_instance<Element, Kind::general_capped>
                                        : launch_gradient_instance<Element, Kind::general>)
                              : (capped ? launch_gradient_instance<Element, Kind::capped>
                                        : launch_gradient_instance<Element, Kind::plain>);
    instance(logits, gradient, grid, stream);
  };
  if (logits.type == DType::f16) {
    launch(static_cast<cute::half_t*>(nullptr));
  } else {
    launch(static_cast<cute::bfloat16_t*>(nullptr));
  }
}

}  // namespace cutloss::sm90
