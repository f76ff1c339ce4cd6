#include "cuda/fused/sm90/accumulate_epilogue.cuh"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/launch.cuh"

namespace cutloss::cuda::fused::sm90 {

// Where a slab is narrow, reading and writing the sums takes as long as multiplying. Here one group
// of threads does it while the other multiplies, and the addition happens in L2.
void launch_de(const DeProduct& s, const Grid& grid, cudaStream_t stream) {
  using Straight = Config<cute::bfloat16_t, Major::K, Major::MN, Share::columns>;
  ProductParams params{};
  params.rows = s.rows;
  params.columns = s.D;
  params.width = kTileColumns;
  params.depth = s.columns;
  params.count = s.count;
  params.first = s.first;
  params.largest_group = 1;
  const CUtensorMap g =
      tensor_map(s.g.data, DType::bf16, s.rows, s.columns, s.g.stride, kTileRows, kTileDepth);
  const CUtensorMap c =
      tensor_map(s.c.data, DType::bf16, s.columns, s.D, s.c.stride, kTileDepth / 2, 64);
  const CUtensorMap out = tensor_map(s.sums, DType::f32, s.rows, s.D, s.D, 16, 32);
  AccumulateEpilogue<float>::Params epilogue{};
  epilogue.add = s.add;
  epilogue.scale = s.scale;
  launch_product<Straight, AccumulateEpilogue<float>>(g, c, out, {}, params, epilogue, grid.blocks,
                                                      stream);
}

}  // namespace cutloss::cuda::fused::sm90
