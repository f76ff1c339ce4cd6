// dC's and dE's products of a narrow slab in one kernel. Either alone has so few tiles that
// clusters would wait, dC's of the whole list of rows most of all: while some have a tile of dC,
// the others take tiles of dE (TwoWalks).
#include "cuda/fused/sm90/accumulate_launch.cuh"
#include "cuda/fused/sm90/dc_and_de.h"
#include "cuda/fused/sm90/instances.h"

namespace cutloss::cuda::fused::sm90 {
namespace {

using Dc = DcConfig<Gather::nothing>;

// Where a tile of the cluster begins in this block.
struct Place {
  int row, column, last_column;
  __device__ Place(const TilePosition& tile, const ProductParams& p, int rank)
      : row((tile.row_block * kCluster + rank) * kTileRows),
        column(tile.column_tile * p.width),
        last_column(column + p.width < p.columns ? column + p.width : p.columns) {}
};

template <class Out>
__global__ void __launch_bounds__(kThreads, 1)
    dc_and_de_kernel(const __grid_constant__ Accumulated dc,
                     const __grid_constant__ Accumulated de) {
  using namespace cute;
  using DcEpilogue = AccumulateEpilogue<Out>;
  using DeEpilogue = AccumulateEpilogue<float>;
  extern __shared__ __align__(1024) char raw_shared[];
  auto& shared = *reinterpret_cast<Shared<Dc, DcEpilogue, DcAndDe>*>(raw_shared);
  const int thread = threadIdx.x;
  const int warp_group = thread / 128;
  const int rank = blockIdx.x % kCluster;
  const int cluster = blockIdx.x / kCluster;

  // The list of rows is dC's depth.
  const int rows = clamp_count(de.params, de.params.rows);
  const TwoWalks& walk = shared.walk.walk;
  if (thread == 0) {
    shared.walk = DcAndDe::make(rows, dc.params.rows, dc.params.columns,
                                static_cast<int>(gridDim.x) / kCluster);
    init_barriers<Dc>(shared);
  }
  cluster_arrive();
  cluster_wait();

  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Dc::kLoaderRegisters>();
    if (thread == 0) {
      Ring ring{0, 1};
      for (int number = 0;; ++number) {
        const TwoWalks::Item item = walk.at(cluster, number);
        if (item.tile < 0) break;
        if (item.is_long) {
          const Place at(walk.long_tiles.at(item.tile), dc.params, rank);
          load_operands<Dc>(shared, ring, dc.a, dc.b, {}, dc.params, rows, at.row, at.column, rank);
        } else {
          const Place at(walk.short_tiles.at(item.tile), de.params, rank);
          load_operands<DeConfig>(shared, ring, de.a, de.b, {}, de.params, de.params.depth, at.row,
                                  at.column, rank);
        }
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Dc::kMultiplierRegisters>();
    const int turn = warp_group - 1;
    Tensor sums =
        partition_fragment_C(typename Dc::Mma{}, Shape<Int<kTileRows>, Int<kTileColumns>>{});
    char* buffer = shared.epilogue + (thread / 32 - 4) * DcEpilogue::kWarpBytes;
    DcEpilogue dc_epilogue(dc.epilogue, &dc.out, buffer, shared.facts[turn], walk.long_tiles,
                           cluster, rank, turn);
    DeEpilogue de_epilogue(de.epilogue, &de.out, buffer, shared.facts[turn], walk.short_tiles,
                           cluster, rank, turn);
    if (turn == 1) ptx::named_arrive(1, 256);
    unsigned before = 0;
    for (int number = 0;; ++number) {
      const TwoWalks::Item item = walk.at(cluster, number);
      if (item.tile < 0) break;
      const int steps = item.is_long ? shared.walk.dc_steps : shared.walk.de_steps;
      if ((number & 1) == turn) {
        const Place at = item.is_long ? Place(walk.long_tiles.at(item.tile), dc.params, rank)
                                      : Place(walk.short_tiles.at(item.tile), de.params, rank);
        ptx::named_sync(1 + turn, 256);
        if (item.is_long) {
          multiply_tile<Dc>(shared, Ring::at(before), steps, sums);
          dc_epilogue.tile(sums, {}, at.row, at.column, dc.params.rows, at.last_column);
        } else {
          multiply_tile<DeConfig>(shared, Ring::at(before), steps, sums);
          de_epilogue.tile(sums, {}, at.row, at.column, rows, at.last_column);
        }
      }
      before += static_cast<unsigned>(steps);
    }
    ptx::wait_stores_done();
  }
  cluster_arrive();
  cluster_wait();
}

template <class Out>
void launch(const DcProduct& dc, const DeProduct& de, const Grid& grid, cudaStream_t stream) {
  launch_blocks<sizeof(Shared<Dc, AccumulateEpilogue<Out>, DcAndDe>)>(
      dc_and_de_kernel<Out>, grid.blocks, stream, operands_of(dc), operands_of(de));
}

}  // namespace

void launch_dc_and_de(const DcProduct& dc, const DeProduct& de, const Grid& grid,
                      cudaStream_t stream) {
  dc.dc_type == DType::f32 ? launch<float>(dc, de, grid, stream)
                           : launch<cute::bfloat16_t>(dc, de, grid, stream);
}

}  // namespace cutloss::cuda::fused::sm90
