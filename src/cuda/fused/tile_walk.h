// The order in which the clusters of a persistent kernel take the tiles of (row blocks x column
// tiles). Row blocks come in groups; within a group all row blocks of a column tile come first,
// so that the rows of a group stay in L2 while the columns stream by once. Cluster c takes tiles
// c, c + clusters, c + 2 clusters, ...: where the sizes of the groups divide the number of
// clusters, a cluster keeps to one row block of a group and can carry that row block's sums in
// registers. docs/kernels.md, "Order of tiles".
#pragma once

#ifdef __CUDACC__
#define CUTLOSS_WALK __host__ __device__
#else
#define CUTLOSS_WALK
#endif

namespace cutloss::cuda::fused {

struct TilePosition {
  int row_block;
  int column_tile;
  int run;  // which run of equal groups
};

struct TileWalk {
  // Groups of one size, one after the other.
  struct Run {
    int first_tile;
    int first_block;
    int group;  // row blocks in each group
  };
  static constexpr int kMostRuns = 8;  // the divisors of a number below 200 that are ever used

  int runs = 0;
  int tiles = 0;
  int row_blocks = 0;
  int column_tiles = 0;
  int clusters = 1;
  Run run[kMostRuns];

  // Greedy: the largest divisor of `clusters` that is at most `largest` and what is left.
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
      // The last run takes the rest: groups of one, where it must.
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

}  // namespace cutloss::cuda::fused
