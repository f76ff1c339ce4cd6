#include "cuda/sm90/sm90.h"

#include <algorithm>

#include "cuda/sm90/instances.h"

namespace cutloss::sm90 {
namespace {

constexpr int kTileColumns = 192;

}  // namespace

int column_tiles(std::int64_t columns) {
  return static_cast<int>((columns + kTileColumns - 1) / kTileColumns);
}

Grid grid_for(int multiprocessors, std::int64_t l2_bytes, int rows, int depth) {
  Grid grid;
  // With one block of rows a cluster would multiply the same columns by nothing.
  grid.cluster = rows <= 128 ? 1 : 2;
  grid.blocks = multiprocessors / grid.cluster * grid.cluster;
  const std::int64_t block_bytes = std::int64_t{grid.block_rows()} * depth * 2;
  // E of a group and the passing columns of C share L2: 3/5 of it for E.
  grid.largest_group =
      static_cast<int>(std::max<std::int64_t>(1, l2_bytes * 3 / 5 / block_bytes));
  return grid;
}

std::int64_t partial_entries(const Grid& grid, int rows) {
  const int blocks = (rows + grid.block_rows() - 1) / grid.block_rows();
  std::int64_t most = 0;
  // The fewer rows count, the smaller the groups may be: every number of blocks is tried.
  for (int b = 1; b <= blocks; ++b) {
    const TileWalk walk = TileWalk::make(b, 1, grid.clusters(), grid.largest_group);
    std::int64_t entries = 0;
    for (int r = 0; r < walk.runs; ++r) {
      const int end = r + 1 < walk.runs ? walk.run[r + 1].first_block : b;
      entries += std::int64_t{end - walk.run[r].first_block} * grid.block_rows() * 2 *
                 walk.sharers(r);
    }
    most = std::max(most, entries);
  }
  return most;
}

void launch_statistics(const Logits& logits, const Statistics& statistics, const Grid& grid,
                       cudaStream_t stream) {
  const auto launch = [&]<class Element>(Element*) {
    if (grid.cluster == 2) {
      (statistics.all ? launch_statistics_instance<Element, 2, true>
                      : launch_statistics_instance<Element, 2, false>)(logits, statistics, grid,
                                                                       stream);
    } else {
      (statistics.all ? launch_statistics_instance<Element, 1, true>
                      : launch_statistics_instance<Element, 1, false>)(logits, statistics, grid,
                                                                       stream);
    }
  };
  if (logits.type == DType::f16) {
    launch(static_cast<cute::half_t*>(nullptr));
  } else {
    launch(static_cast<cute::bfloat16_t*>(nullptr));
  }
}

void launch_gradient(const Logits& logits, const GradientOfLogits& gradient, const Grid& grid,
                     cudaStream_t stream) {
  if (logits.type == DType::f16) {
    launch_gradient_instance<cute::half_t>(logits, gradient, grid, stream);
  } else {
    launch_gradient_instance<cute::bfloat16_t>(logits, gradient, grid, stream);
  }
}

}  // namespace cutloss::sm90
