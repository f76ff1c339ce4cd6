// The persistent kernel behind every product of this folder: out = A * B^T over tiles of 128 rows
// and 192 columns, with what happens to a finished tile left to an epilogue.
//
// A block has three warp groups. One brings tiles of A and B into shared memory (TMA), two multiply
// in turn: while one runs its epilogue the other has the tensor cores. Blocks come in clusters of
// two that share one operand, read once for both: the columns (B), each block with rows of its own,
// or, where rows are few, the rows (A), each with columns of its own. docs/kernels.md has the
// budget of shared memory and registers, and what was measured.
#pragma once

#include <cuda.h>

#include <cstdint>

#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>

#include "cuda/fused/sm90/ptx.h"
#include "cuda/fused/sm90/tuning.h"
#include "cuda/fused/tile_walk.h"

namespace cutloss::cuda::fused::sm90 {

using cute::GMMA::Major;

inline constexpr int kThreads = 384;
inline constexpr int kStripBytes = 2048;  // 16 rows of 128 bytes

template <class Element, Major a, Major b>
struct Multiply;
template <Major a, Major b>
struct Multiply<cute::bfloat16_t, a, b> {
  using Op = cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_SS<a, b>;
};
template <Major a, Major b>
struct Multiply<cute::half_t, a, b> {
  using Op = cute::SM90::GMMA::MMA_64x192x16_F32F16F16_SS<a, b>;
};

inline constexpr int kCluster = 2;
inline constexpr int kStages = 5;
enum class Share { columns, rows };

// Which operand has rows that lie anywhere. With `a` all threads that load copy rows of A. With `b`
// rows of B are the product's depth, and one warp loads them, in one box where they are neighbours,
// and else row by row.
enum class Gather { nothing, a, b };
struct NoMap {};

// The facts that a kernel is compiled for.
template <class Element_, Major kMajorA_, Major kMajorB_, Share kShare_,
          Gather kGather_ = Gather::nothing>
struct Config {
  using Element = Element_;
  static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
  static constexpr Share kShare = kShare_;  // what the blocks of a cluster have in common
  static constexpr bool kGather = kGather_ == Gather::a;
  static constexpr bool kGatherB = kGather_ == Gather::b;
  using MapOfRow = std::conditional_t<kGatherB, CUtensorMap, NoMap>;
  // The rows and columns of a cluster's tile.
  static constexpr int kBlockRows = kShare == Share::columns ? kCluster * kTileRows : kTileRows;
  // Registers of a thread in the warp group that loads, and in those that multiply.
  static constexpr int kLoaderRegisters = kGather ? 40 : 24;
  static constexpr int kMultiplierRegisters = kGather ? 232 : 240;

  using Mma = decltype(cute::make_tiled_mma(typename Multiply<Element, kMajorA, kMajorB>::Op{}));

  template <Major major, int extent>
  static constexpr auto tile_layout() {
    using Shape = cute::Shape<cute::Int<extent>, cute::Int<kTileDepth>, cute::Int<kStages>>;
    if constexpr (major == Major::K) {
      return cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{}, Shape{});
    } else {
      return cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape{},
                                 cute::Step<cute::_2, cute::_1, cute::_3>{});
    }
  }
};

template <class Config, class Epilogue, class Walk = TileWalk>
struct Shared {
  using Element = typename Config::Element;
  alignas(1024) Element a[kStages * kTileRows * kTileDepth];
  alignas(1024) Element b[kStages * kTileColumns * kTileDepth];
  alignas(1024) char epilogue[8 * Epilogue::kWarpBytes];  // a part for each warp that multiplies
  typename Epilogue::Facts facts[2];                      // one for each group that multiplies
  alignas(8) std::uint64_t full[kStages];
  alignas(8) std::uint64_t empty[kStages];
  Walk walk;
};
template <class Config, class Epilogue>
inline constexpr int kSharedBytes = sizeof(Shared<Config, Epilogue>);
inline constexpr int kMostSharedBytes = 227 * 1024;  // what a block may have

struct ProductParams {
  int rows;  // an upper bound of the product's rows
  int columns;
  int depth;            // an upper bound, as rows is
  int width;            // columns of a tile: 192, or fewer where that balances the blocks' work
  const int* count;     // null, or how many entries the list of rows has, in device memory
  int first;            // the number in that list of this product's first row (or depth)
  bool count_is_depth;  // the list runs along the product's depth, not along its rows
  int largest_group;
  // Null, or a number in device memory: nothing is done where it is 0. Nor is anything done where
  // there is no row, or no depth: the output stays as it is.
  const int* only_if;
  // Where it is null, row r of A is row r of the product. Else row r of the product is row
  // positions[first + r] of `a`. Of the two kernels, the one that gathers works where these rows
  // do not lie one after the other, the other one where they do. With Gather::b the positions
  // are those of the depth and of B, and one kernel does both.
  const int* positions;
  const void* a;
  std::int64_t a_stride;
};

__device__ inline int clamp_count(const ProductParams& p, int most) {
  if (p.count == nullptr) return most;
  const int left = *p.count - p.first;
  return left < 0 ? 0 : (left < most ? left : most);
}

// The place of a thread in the ring of stages. Threads that load begin with parity 1, since the
// stages are empty.
struct Ring {
  int stage = 0, parity = 0;
  // The place after so many steps.
  static __device__ Ring at(unsigned steps) {
    return {static_cast<int>(steps % kStages), static_cast<int>(steps / kStages) & 1};
  }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <class Config, class SharedOf>
__device__ __forceinline__ void init_barriers(SharedOf& shared) {
  for (int i = 0; i < kStages; ++i) {
    ptx::barrier_init(&shared.full[i], Config::kGather ? 129 : 1);
    ptx::barrier_init(&shared.empty[i], kCluster);
  }
  ptx::barrier_init_fence();
}

// Loads the operands of a tile, a step of its depth at a time. `row` is the tile's first in A as it
// lies. With Gather::a `from` says where this thread's 16 bytes of rows of the tile come from.
template <class Config, class SharedOf>
__device__ __forceinline__ void load_operands(SharedOf& shared, Ring& ring,
                                              const CUtensorMap& map_a, const CUtensorMap& map_b,
                                              const typename Config::MapOfRow& map_row_of_b,
                                              const ProductParams& p, int depth, int row,
                                              int column, int rank,
                                              const char* const* from = nullptr) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr bool kSharesColumns = Config::kShare == Share::columns;
  constexpr int kABytes = kTileRows * kTileDepth * 2;
  constexpr std::uint16_t kBoth = 3;  // the mask of both blocks of the cluster
  const int thread = threadIdx.x;
  // With Gather::b a lane has a row of the block's half. Beyond the depth, where A is zero, it
  // takes the last row again: what lies there may be no number. Positions are read a step ahead.
  const auto position_at = [&](int d) {
    const int r = d + kTileDepth / 2 * rank + thread;
    return p.positions[p.first + (r < depth ? r : depth - 1)];
  };
  [[maybe_unused]] int next_position = 0;
  if constexpr (Config::kGatherB) next_position = position_at(0);
  for (int d = 0; d < depth; d += kTileDepth, ring.advance()) {
    [[maybe_unused]] const int position = next_position;
    if constexpr (Config::kGatherB) next_position = position_at(d + kTileDepth);
    ptx::barrier_wait(&shared.empty[ring.stage], ring.parity);
    std::uint64_t* full = &shared.full[ring.stage];
    Element* a = shared.a + ring.stage * kTileRows * kTileDepth;
    Element* b = shared.b + ring.stage * kTileColumns * kTileDepth;
    if (thread == 0) {
      ptx::barrier_expect(full, (Config::kGather ? 0 : kABytes) + p.width * kTileDepth * 2);
      if constexpr (!kSharesColumns) {
        ptx::load_tile(&map_b, full, b, d, column);
      } else if constexpr (Config::kMajorB == Major::K) {
        // Each block brings half of the columns, for both.
        const int half = kTileColumns / 2 * rank;
        ptx::load_tile_multicast(&map_b, full, b + half * kTileDepth, d, column + half, kBoth);
      } else {
        if constexpr (!Config::kGatherB) {
          const int half = kTileDepth / 2 * rank;
          for (int i = 0; i < kTileColumns; i += 64) {
            ptx::load_tile_multicast(&map_b, full, b + i * kTileDepth + half * 64, column + i,
                                     d + half, kBoth);
          }
        }
      }
    }
    if constexpr (Config::kGatherB) {
      __syncwarp();  // the barrier expects these bytes
      const int half = kTileDepth / 2 * rank;
      const int first = __shfl_sync(~0u, position, 0);
      const bool together = __all_sync(~0u, position - first == thread);
      for (int i = 0; i < kTileColumns; i += 64) {
        Element* to = b + i * kTileDepth + half * 64;
        if (!together) {
          ptx::load_tile_multicast(&map_row_of_b, full, to + thread * 64, column + i, position,
                                   kBoth);
        } else if (thread == 0) {
          ptx::load_tile_multicast(&map_b, full, to, column + i, first, kBoth);
        }
      }
    }
    if constexpr (Config::kGather) {
      const int chunk = thread % 8, first = thread / 8;
      const std::uint32_t to = ptx::shared_address(a) + first * 128 + ((chunk ^ (first % 8)) * 16);
      const int bytes = d + chunk * 8 < depth ? 16 : 0;
      CUTE_UNROLL
      for (int j = 0; j < kTileRows / 16; ++j) {
        ptx::copy_16_bytes(to + j * 16 * 128, from[j] + (bytes == 0 ? 0 : d * 2), bytes);
      }
      ptx::arrive_after_copies(full);
    } else if constexpr (!kSharesColumns) {
      const int half = kTileRows / 2 * rank;
      ptx::load_tile_multicast(&map_a, full, a + half * kTileDepth, d, row + half, kBoth);
    } else if constexpr (Config::kMajorA == Major::K) {
      ptx::load_tile(&map_a, full, a, d, row);
    } else if (!Config::kGatherB || thread == 0) {
      for (int i = 0; i < kTileRows; i += 64) {
        ptx::load_tile(&map_a, full, a + i * kTileDepth, row + i, d);
      }
    }
  }
}

// Makes the sums of a tile: waits for its stages and hands them back.
template <class Config, class SharedOf, class Sums>
__device__ __forceinline__ void multiply_tile(SharedOf& shared, Ring ring, int steps, Sums& sums) {
  using namespace cute;
  const int in_group = threadIdx.x % 128;
  typename Config::Mma mma;
  const Tensor sA = make_tensor(make_smem_ptr(shared.a),
                                Config::template tile_layout<Config::kMajorA, kTileRows>());
  const Tensor sB = make_tensor(make_smem_ptr(shared.b),
                                Config::template tile_layout<Config::kMajorB, kTileColumns>());
  const auto slice = mma.get_thread_slice(in_group);
  const Tensor tCrA = slice.make_fragment_A(slice.partition_A(sA));  // (MMA,MMA_M,MMA_K,PIPE)
  const Tensor tCrB = slice.make_fragment_B(slice.partition_B(sB));  // (MMA,MMA_N,MMA_K,PIPE)
  int previous = 0;
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  warpgroup_fence_operand(sums);
  for (int k = 0; k < steps; ++k) {
    ptx::barrier_wait(&shared.full[ring.stage], ring.parity);
    if constexpr (Config::kGather) ptx::fence_async_proxy();
    warpgroup_arrive();
    CUTE_UNROLL
    for (int kk = 0; kk < kTileDepth / 16; ++kk) {
      cute::gemm(mma, tCrA(_, _, kk, ring.stage), tCrB(_, _, kk, ring.stage), sums);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<1>();
    if (k > 0 && in_group < kCluster) ptx::barrier_arrive(&shared.empty[previous], in_group);
    previous = ring.stage;
    ring.advance();
  }
  ptx::named_arrive(2 - (threadIdx.x / 128 - 1), 256);
  warpgroup_wait<0>();
  warpgroup_fence_operand(sums);
  if (in_group < kCluster) ptx::barrier_arrive(&shared.empty[previous], in_group);
}

template <class Config, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap map_a,
                   const __grid_constant__ CUtensorMap map_b,
                   const __grid_constant__ CUtensorMap map_out,
                   const __grid_constant__ typename Config::MapOfRow map_row_of_b,
                   const __grid_constant__ ProductParams p,
                   const __grid_constant__ typename Epilogue::Params epilogue_params) {
  using namespace cute;
  constexpr bool kSharesColumns = Config::kShare == Share::columns;

  // If it were aligned by hand, the compiler would no longer know it as shared memory, and every
  // access would be slow.
  extern __shared__ __align__(1024) char raw_shared[];
  auto& shared = *reinterpret_cast<Shared<Config, Epilogue>*>(raw_shared);
  const int thread = threadIdx.x;
  const int warp_group = thread / 128;
  const int rank = blockIdx.x % kCluster;
  const int cluster = blockIdx.x / kCluster;
  const int clusters = gridDim.x / kCluster;

  const int depth = p.count_is_depth ? clamp_count(p, p.depth) : p.depth;
  const bool wanted = depth > 0 && (p.only_if == nullptr || *p.only_if != 0);
  int rows = !wanted ? 0 : p.count_is_depth ? p.rows : clamp_count(p, p.rows);
  const int steps = (depth + kTileDepth - 1) / kTileDepth;
  int first_position = 0;
  if (!Config::kGatherB && p.positions != nullptr && rows > 0) {
    first_position = p.positions[p.first];
    const bool dense = p.positions[p.first + rows - 1] - first_position == rows - 1;
    if (dense == Config::kGather) rows = 0;
  }
  const auto first_row = [&](const TilePosition& tile) {
    return kSharesColumns ? (tile.row_block * kCluster + rank) * kTileRows
                          : tile.row_block * kTileRows;
  };
  const auto first_column = [&](const TilePosition& tile) {
    return kSharesColumns ? tile.column_tile * p.width
                          : (tile.column_tile * kCluster + rank) * p.width;
  };
  const TileWalk& walk = shared.walk;
  if (thread == 0) {
    if (ptx::shared_address(raw_shared) % 1024 != 0) __trap();
    const int width = kSharesColumns ? p.width : kCluster * p.width;
    shared.walk = TileWalk::make((rows + Config::kBlockRows - 1) / Config::kBlockRows,
                                 (p.columns + width - 1) / width, clusters, p.largest_group);
    init_barriers<Config>(shared);
  }
  cluster_arrive();
  cluster_wait();

  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kLoaderRegisters>();
    if (Config::kGather || thread < (Config::kGatherB ? 32 : 1)) {
      Ring ring{0, 1};
      // Where this thread's 16 bytes of a row of the tile come from: eight threads copy a row.
      [[maybe_unused]] const char* from[kTileRows / 16];
      [[maybe_unused]] int found_block = -1;
      for (int t = cluster; t < walk.tiles; t += clusters) {
        const TilePosition tile = walk.at(t);
        const int row = first_row(tile), column = first_column(tile);
        if constexpr (Config::kGather) {
          if (found_block != tile.row_block) {
            CUTE_UNROLL
            for (int j = 0; j < kTileRows / 16; ++j) {
              const int r = row + thread / 8 + 16 * j;
              from[j] = static_cast<const char*>(p.a) + thread % 8 * 16 +
                        p.positions[p.first + (r < rows ? r : 0)] * p.a_stride * 2;
            }
            found_block = tile.row_block;
          }
        }
        load_operands<Config>(shared, ring, map_a, map_b, map_row_of_b, p, depth,
                              first_position + row, column, rank, from);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kMultiplierRegisters>();
    const int turn = warp_group - 1;
    Tensor sums = partition_fragment_C(
        typename Config::Mma{}, Shape<Int<kTileRows>, Int<kTileColumns>>{});  // ((2,2,24),2,1)

    Epilogue epilogue(epilogue_params, &map_out,
                      shared.epilogue + (thread / 32 - 4) * Epilogue::kWarpBytes,
                      shared.facts[turn], walk, cluster, rank, turn);
    // Products are issued in the order of the tiles: a barrier for each of the two groups. Without
    // it one group could wait for a stage two rounds ahead, whose parity reads as done.
    if (turn == 1) ptx::named_arrive(1, 256);
    int number = 0;
    for (int t = cluster; t < walk.tiles; t += clusters, ++number) {
      if ((number & 1) != turn) continue;
      const TilePosition tile = walk.at(t);
      const int row = first_row(tile), column = first_column(tile);
      const int last_column = column + p.width < p.columns ? column + p.width : p.columns;
      ptx::named_sync(3 + turn, 128);  // the whole group is done with the last tile's facts
      epilogue.prepare(row, column, rows, last_column);
      ptx::named_sync(1 + turn, 256);
      const unsigned before = static_cast<unsigned>(number) * static_cast<unsigned>(steps);
      multiply_tile<Config>(shared, Ring::at(before), steps, sums);

      ptx::named_sync(3 + turn, 128);
      epilogue.tile(sums, tile, row, column, rows, last_column);
    }
    epilogue.finish();
    ptx::wait_stores_done();
  }
  // No block leaves while another one of its cluster may still signal its barriers.
  cluster_arrive();
  cluster_wait();
}

// A thread's sums are those of row m * 64 + r * 8 + warp * 16 + lane / 4 of the tile, columns i / 2
// * 8 + lane % 4 * 2 + i % 2. They must be worked on in place: they occupy most of the registers,
// and a copy of a row would not fit beside them.
inline constexpr int kRowsOfThread = 4;  // a row's index is 2 m + r
inline constexpr int kRowSums = kTileColumns / 4;

template <class Sums>
struct RowSums {
  Sums& sums;
  int m, r;
  __device__ __forceinline__ float& operator[](int i) const {
    return sums(cute::make_coord(cute::make_coord(i % 2, r, i / 2), m, 0));
  }
};
template <class Sums>
__device__ __forceinline__ RowSums<Sums> row_of(Sums& sums, int index) {
  return {sums, index / 2, index % 2};
}

struct Lane {
  int warp = threadIdx.x % 128 / 32;
  int lane = threadIdx.x % 32;
  __device__ int row(int index) const {
    return index / 2 * 64 + index % 2 * 8 + warp * 16 + lane / 4;
  }
  __device__ int column(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
};

// Stores 16 rows of a warp, 64 columns of 16 bits, through its 2 KB of shared memory. They are
// those of part m of the tile from column h * 64 on. pack(low, high) makes a pair of 16-bit
// numbers.
template <class Sums, class Pack>
__device__ __forceinline__ void store_strip(Sums& sums, int m, int h, const CUtensorMap* map,
                                            char* buffer, int row, int column, Pack pack) {
  const int lane = threadIdx.x % 32;
  std::uint32_t values[8][2];
  CUTE_UNROLL
  for (int j = 0; j < 8; ++j) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const auto z = row_of(sums, 2 * m + r);
      values[j][r] = pack(z[(h * 8 + j) * 2], z[(h * 8 + j) * 2 + 1]);
    }
  }
  ptx::wait_stores_read<0>();
  __syncwarp();
  const int r = lane % 16, half = lane / 16;
  CUTE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    ptx::store_matrices(ptx::shared_address(buffer) + r * 128 + (((j + half) ^ (r % 8)) * 16),
                        values[j][0], values[j][1], values[j + 1][0], values[j + 1][1]);
  }
  ptx::fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
    ptx::store_tile(map, buffer, column, row);
    ptx::commit_stores();
  }
}

}  // namespace cutloss::cuda::fused::sm90
