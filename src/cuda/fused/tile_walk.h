// The order in which the clusters of a persistent kernel take the tiles of (row blocks x column
// tiles). Row blocks come in groups; within a group all row blocks of a column tile come first,
// so that the rows of a group stay in L2 while the columns stream by once. Cluster c takes tiles
// c, c + clusters, c + 2 clusters, ...: where the sizes of the groups divide the number of
// clusters, a cluster keeps to one row block of a group and can carry that row block's sums in
// registers. docs/kernels.md, "Order of tiles".
#pragma once

#include <cstdint>

#include "core/host_device.h"

#define CUTLOSS_WALK CUTLOSS_HOST_DEVICE

namespace cutloss::cuda::fused {

struct TilePosition {
  int row_block;
  int column_tile;
  int run;  // the number of its run of equal groups
};

struct TileWalk {
  // A run is some groups of one size, one after the other.
  struct Run {
    int first_tile;
    int first_block;
    int group;  // how many row blocks each group has
  };
  static constexpr int kMostRuns = 8;  // no number below 200 needs more of its divisors

  int runs = 0;
  int tiles = 0;
  int row_blocks = 0;
  int column_tiles = 0;
  int clusters = 1;
  Run run[kMostRuns];

  // Each group is the largest divisor of `clusters` that is at most `largest` and what is left.
  CUTLOSS_WALK static TileWalk make(int row_blocks, int column_tiles, int clusters, int largest) {
    TileWalk walk;
    walk.row_blocks = row_blocks;
    walk.column_tiles = column_tiles;
    walk.clusters = clusters;
    walk.tiles = row_blocks * column_tiles;
    int first = 0;
    int group = largest < clusters ? largest : clusters;
    while (first < row_blocks) {
      const int left = row_blocks - first;
      if (group > left) group = left;
      while (clusters % group != 0) --group;
      // The last run takes all that is left, in groups of one.
      const bool last = walk.runs == kMostRuns - 1;
      if (last) group = 1;
      walk.run[walk.runs++] = {first * column_tiles, first, group};
      first += left / group * group;
    }
    return walk;
  }

  CUTLOSS_WALK int run_of_block(int row_block) const {
    int r = 0;
    while (r + 1 < runs && row_block >= run[r + 1].first_block) ++r;
    return r;
  }

  CUTLOSS_WALK TilePosition at(int tile) const {
    int r = 0;
    while (r + 1 < runs && tile >= run[r + 1].first_tile) ++r;
    const int u = tile - run[r].first_tile;
    const int per_group = run[r].group * column_tiles;
    const int in_group = u % per_group;
    return {run[r].first_block + u / per_group * run[r].group + in_group % run[r].group,
            in_group / run[r].group, r};
  }

  // The clusters that share a row block, and which of them a cluster is.
  CUTLOSS_WALK int sharers(int r) const { return clusters / run[r].group; }
  CUTLOSS_WALK int sharer(int r, int cluster) const { return cluster / run[r].group; }
};

// The walk of two products in one kernel, whose tiles take different times: few long ones, and many
// short ones. Clusters that have one long tile less take more short ones, so that all end together.
// Clusters of an odd number take their short tiles before the long ones: what short tiles read from
// memory and write to it passes beside the others' multiplications.
struct TwoWalks {
  TileWalk long_tiles, short_tiles;
  int heavy = 0;  // how many clusters, the first ones, have one long tile more than the others
  int ahead = 0;  // how many short tiles more these others have

  struct Item {
    bool is_long;
    int tile;  // its number in its walk; -1 where the cluster has no more
  };

  // `long_time` and `short_time` are what a tile takes, in any unit.
  CUTLOSS_WALK static TwoWalks make(const TileWalk& long_tiles, const TileWalk& short_tiles,
                                    int long_time, int short_time) {
    TwoWalks walks{long_tiles, short_tiles, long_tiles.tiles % long_tiles.clusters};
    if (walks.heavy > 0) walks.ahead = long_time / short_time;
    return walks;
  }

  CUTLOSS_WALK int long_count(int cluster) const {
    return every(long_tiles.tiles - cluster, long_tiles.clusters);
  }
  CUTLOSS_WALK int short_count(int cluster) const {
    const int clusters = long_tiles.clusters, light = clusters - heavy;
    const int extra = light * ahead < short_tiles.tiles ? light * ahead : short_tiles.tiles;
    return (cluster < heavy ? 0 : every(extra - (cluster - heavy), light)) +
           every(short_tiles.tiles - extra - (clusters - 1 - cluster), clusters);
  }

  CUTLOSS_WALK Item at(int cluster, int number) const {
    const int clusters = long_tiles.clusters;
    const int longs = long_count(cluster), shorts = short_count(cluster);
    if (number >= longs + shorts) return {false, -1};
    const bool short_first = cluster % 2 == 1;
    const bool is_long = short_first ? number >= shorts : number < longs;
    const int n = is_long == short_first ? number - (is_long ? shorts : longs) : number;
    if (is_long) return {true, cluster + n * clusters};
    const int light = clusters - heavy, more = cluster < heavy ? 0 : ahead;
    if (n < more) return {false, cluster - heavy + n * light};
    return {false, light * ahead + (n - more) * clusters + clusters - 1 - cluster};
  }

  // The time at which the last cluster ends.
  CUTLOSS_WALK std::int64_t time(int long_time, int short_time) const {
    std::int64_t most = 0;
    const int latest[] = {heavy > 0 ? heavy - 1 : 0, heavy, long_tiles.clusters - 1};
    for (const int cluster : latest) {
      const std::int64_t end = std::int64_t{long_count(cluster)} * long_time +
                               std::int64_t{short_count(cluster)} * short_time;
      if (end > most) most = end;
    }
    return most;
  }

 private:
  // Counts how many of 0, step, 2 step, ... lie below `end`.
  CUTLOSS_WALK static int every(int end, int step) { return end > 0 ? (end + step - 1) / step : 0; }
};

}  // namespace cutloss::cuda::fused
