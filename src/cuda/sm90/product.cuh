// The persistent kernel behind every product of this folder: out = A * B^T over tiles of 128 rows
// and 192 columns, with what happens to a finished tile left to an epilogue.
//
// Three warp groups: one brings tiles of A and B into shared memory (TMA), two multiply, in turn:
// while one runs its epilogue the other has the tensor cores. Blocks come in clusters of two, with
// row blocks of their own and the same columns, so that a tile of B is read once for both.
// docs/kernels.md has the budget of shared memory and registers, and what was measured.
#pragma once

#include <cuda.h>

#include <cstdint>

#include <cute/tensor.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/sm90/ptx.h"
#include "cuda/sm90/tile_walk.h"

namespace cutloss::sm90 {

using cute::GMMA::Major;

inline constexpr int kTileRows = 128;
inline constexpr int kTileColumns = 192;
inline constexpr int kTileDepth = 64;
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

// What a kernel is compiled for.
template <class Element_, Major kMajorA_, Major kMajorB_, int kCluster_, bool kGather_ = false>
struct Config {
  using Element = Element_;
  static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
  static constexpr int kCluster = kCluster_;    // blocks that share their columns
  static constexpr bool kGather = kGather_;     // rows of A lie anywhere
  static constexpr int kStages = 5;
  // Registers a thread: of the warp group that loads, of those that multiply.
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

template <class Config, class Epilogue>
struct Shared {
  using Element = typename Config::Element;
  alignas(1024) Element a[Config::kStages * kTileRows * kTileDepth];
  alignas(1024) Element b[Config::kStages * kTileColumns * kTileDepth];
  alignas(1024) char epilogue[8 * Epilogue::kWarpBytes];  // of each warp that multiplies
  alignas(8) std::uint64_t full[Config::kStages];
  alignas(8) std::uint64_t empty[Config::kStages];
  TileWalk walk;
  std::int64_t row_offset[Config::kGather ? kTileRows : 1];
};
template <class Config, class Epilogue>
inline constexpr int kSharedBytes = sizeof(Shared<Config, Epilogue>) + 1024;  // to align to 1024

// Rows of A that lie anywhere: row r of the product is at base + offset_of[r] * stride.
struct Gather {
  const void* base;
  const int* row;  // which row of `base`
  std::int64_t stride;
  int depth;
};

struct ProductParams {
  int rows;     // of the product, at most
  int columns;
  int depth;    // at most
  const int* count;   // null, or in device memory: the entries of the list of rows that count ...
  int first;          // ... of which this product's first row (or depth) is number `first`
  bool count_is_depth;  // the list runs along the product's depth, not along its rows
  int largest_group;
  const int* only_if;  // null, or in device memory: nothing is done where it is 0
                       // (nor where there is no row, or no depth: the output stays as it is)
  Gather gather;
};

__device__ inline int clamp_count(const ProductParams& p, int most) {
  if (p.count == nullptr) return most;
  const int left = *p.count - p.first;
  return left < 0 ? 0 : (left < most ? left : most);
}

template <class Config, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap map_a,
                   const __grid_constant__ CUtensorMap map_b,
                   const __grid_constant__ CUtensorMap map_out,
                   const __grid_constant__ ProductParams p,
                   const __grid_constant__ typename Epilogue::Params epilogue_params) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr int kStages = Config::kStages;
  constexpr int kCluster = Config::kCluster;
  constexpr int kABytes = kTileRows * kTileDepth * 2;
  constexpr int kBBytes = kTileColumns * kTileDepth * 2;
  constexpr int kOwnColumns = kTileColumns / kCluster;  // of a tile of B, loaded by this block
  constexpr int kOwnDepth = kTileDepth / kCluster;

  extern __shared__ char raw_shared[];
  auto& shared = *reinterpret_cast<Shared<Config, Epilogue>*>(
      (reinterpret_cast<std::uintptr_t>(raw_shared) + 1023) & ~std::uintptr_t{1023});
  const int thread = threadIdx.x;
  const int warp_group = thread / 128;
  const int rank = blockIdx.x % kCluster;
  const int cluster = blockIdx.x / kCluster;
  const int clusters = gridDim.x / kCluster;

  const int depth = p.count_is_depth ? clamp_count(p, p.depth) : p.depth;
  const bool wanted = depth > 0 && (p.only_if == nullptr || *p.only_if != 0);
  const int rows = !wanted ? 0 : p.count_is_depth ? p.rows : clamp_count(p, p.rows);
  const int steps = (depth + kTileDepth - 1) / kTileDepth;
  constexpr int kBlockRows = kTileRows * kCluster;
  const TileWalk& walk = shared.walk;
  if (thread == 0) {
    shared.walk = TileWalk::make((rows + kBlockRows - 1) / kBlockRows,
                                 (p.columns + kTileColumns - 1) / kTileColumns, clusters,
                                 p.largest_group);
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(&shared.full[i], Config::kGather ? 129 : 1);
      ptx::barrier_init(&shared.empty[i], kCluster);
    }
    ptx::barrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();

  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kLoaderRegisters>();
    if (Config::kGather || thread == 0) {
      int stage = 0, parity = 1;
      int loaded_block = -1;
      for (int t = cluster; t < walk.tiles; t += clusters) {
        const TilePosition tile = walk.at(t);
        const int row = (tile.row_block * kCluster + rank) * kTileRows;
        const int column = tile.column_tile * kTileColumns;
        if constexpr (Config::kGather) {
          if (loaded_block != tile.row_block) {
            ptx::named_sync(5, 128);  // nobody reads the old offsets any more
            const int r = row + thread < rows ? row + thread : 0;
            shared.row_offset[thread] =
                static_cast<std::int64_t>(p.gather.row[p.first + r]) * p.gather.stride;
            ptx::named_sync(5, 128);
            loaded_block = tile.row_block;
          }
        }
        for (int k = 0; k < steps; ++k) {
          ptx::barrier_wait(&shared.empty[stage], parity);
          std::uint64_t* full = &shared.full[stage];
          Element* a = shared.a + stage * kTileRows * kTileDepth;
          Element* b = shared.b + stage * kTileColumns * kTileDepth;
          if (thread == 0) {
            ptx::barrier_expect(full, (Config::kGather ? 0 : kABytes) + kBBytes);
            if constexpr (Config::kMajorB == Major::K) {
              Element* own = b + rank * kOwnColumns * kTileDepth;
              const int own_column = column + rank * kOwnColumns;
              if constexpr (kCluster == 1) {
                ptx::load_tile(&map_b, full, own, k * kTileDepth, own_column);
              } else {
                ptx::load_tile_multicast(&map_b, full, own, k * kTileDepth, own_column, 3);
              }
            } else {
              for (int i = 0; i < kTileColumns / 64; ++i) {
                Element* own = b + i * 64 * kTileDepth + rank * 64 * kOwnDepth;
                const int own_depth = k * kTileDepth + rank * kOwnDepth;
                if constexpr (kCluster == 1) {
                  ptx::load_tile(&map_b, full, own, column + i * 64, own_depth);
                } else {
                  ptx::load_tile_multicast(&map_b, full, own, column + i * 64, own_depth, 3);
                }
              }
            }
          }
          if constexpr (Config::kGather) {
            // A row of the tile is 128 bytes: eight threads copy it, 16 bytes each.
            const int chunk = thread % 8, first = thread / 8;
            const int d = k * kTileDepth + chunk * 8;
            const std::uint32_t to =
                ptx::shared_address(a) + first * 128 + ((chunk ^ (first % 8)) * 16);
            const char* from = static_cast<const char*>(p.gather.base) + std::int64_t{d} * 2;
            const int bytes = d < p.gather.depth ? 16 : 0;
            if (bytes == 0) from = static_cast<const char*>(p.gather.base);
            CUTE_UNROLL
            for (int j = 0; j < kTileRows / 16; ++j) {
              const std::int64_t offset = bytes == 0 ? 0 : shared.row_offset[first + 16 * j];
              ptx::copy_16_bytes(to + j * 16 * 128, from + offset * 2, bytes);
            }
            ptx::arrive_after_copies(full);
          } else if constexpr (Config::kMajorA == Major::K) {
            ptx::load_tile(&map_a, full, a, k * kTileDepth, row);
          } else {
            for (int i = 0; i < kTileRows / 64; ++i) {
              ptx::load_tile(&map_a, full, a + i * 64 * kTileDepth, row + i * 64, k * kTileDepth);
            }
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kMultiplierRegisters>();
    const int turn = warp_group - 1;
    const int in_group = thread % 128;
    typename Config::Mma mma;
    const Tensor sA = make_tensor(make_smem_ptr(shared.a),
                                  Config::template tile_layout<Config::kMajorA, kTileRows>());
    const Tensor sB = make_tensor(make_smem_ptr(shared.b),
                                  Config::template tile_layout<Config::kMajorB, kTileColumns>());
    const auto slice = mma.get_thread_slice(in_group);
    const Tensor tCrA = slice.make_fragment_A(slice.partition_A(sA));  // (MMA,MMA_M,MMA_K,PIPE)
    const Tensor tCrB = slice.make_fragment_B(slice.partition_B(sB));  // (MMA,MMA_N,MMA_K,PIPE)
    Tensor sums = partition_fragment_C(
        mma, Shape<Int<kTileRows>, Int<kTileColumns>>{});  // ((2,2,24),2,1)

    Epilogue epilogue(epilogue_params, &map_out,
                      shared.epilogue + (thread / 32 - 4) * Epilogue::kWarpBytes, walk, cluster,
                      turn);
    // Products are issued in the order of the tiles: a barrier for each of the two groups. Without
    // it one group could wait for a stage two rounds ahead, whose parity reads as done.
    if (turn == 1) ptx::named_arrive(1, 256);
    int number = 0;
    for (int t = cluster; t < walk.tiles; t += clusters, ++number) {
      if ((number & 1) != turn) continue;
      const TilePosition tile = walk.at(t);
      const unsigned before = static_cast<unsigned>(number) * static_cast<unsigned>(steps);
      int stage = static_cast<int>(before % kStages);
      int parity = static_cast<int>(before / kStages) & 1;
      int previous = 0;
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      ptx::named_sync(1 + turn, 256);
      warpgroup_fence_operand(sums);
      for (int k = 0; k < steps; ++k) {
        ptx::barrier_wait(&shared.full[stage], parity);
        if constexpr (Config::kGather) ptx::fence_async_proxy();
        warpgroup_arrive();
        CUTE_UNROLL
        for (int kk = 0; kk < kTileDepth / 16; ++kk) {
          cute::gemm(mma, tCrA(_, _, kk, stage), tCrB(_, _, kk, stage), sums);
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        warpgroup_wait<1>();
        if (k > 0 && in_group < kCluster) ptx::barrier_arrive(&shared.empty[previous], in_group);
        previous = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      ptx::named_arrive(2 - turn, 256);
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      if (in_group < kCluster) ptx::barrier_arrive(&shared.empty[previous], in_group);

      epilogue.tile(sums, tile, (tile.row_block * kCluster + rank) * kTileRows,
                    tile.column_tile * kTileColumns, rows, p.columns);
    }
    epilogue.finish();
    ptx::wait_stores_done();
  }
  // No block leaves while another one of its cluster may still signal its barriers.
  cluster_arrive();
  cluster_wait();
}

// Where in a tile a thread's sums lie: those of row m * 64 + r * 8 + warp * 16 + lane / 4, columns
// i / 2 * 8 + lane % 4 * 2 + i % 2. Work on them in place: they occupy most of the registers, and
// a copy of a row would not fit beside them.
inline constexpr int kRowsOfThread = 4;  // index 2 m + r
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

// Stores 16 rows of a warp, 64 columns of 16 bits, through its 2 KB of shared memory. Part m of
// the tile, columns h * 64 and on; pack(low, high) makes a pair of 16-bit numbers.
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

}  // namespace cutloss::sm90
