#include "cuda/sm90/accumulate_epilogue.cuh"
#include "cuda/sm90/launch.cuh"

namespace cutloss::sm90 {

void launch_accumulation(const Accumulation& s, int multiprocessors, cudaStream_t stream) {
  // The rows of the list are the product's depth; columns (D) come fastest, since going down the
  // vocabulary first would read x again for each tile of D.
  using Transposed = Config<cute::bfloat16_t, Major::MN, Major::MN, Share::columns>;
  ProductParams params{};
  params.rows = s.V;
  params.columns = s.D;
  params.width = kTileColumns;
  params.depth = s.rows;
  params.count = s.count;
  params.first = s.first;
  params.count_is_depth = true;
  params.largest_group = 1;
  const CUtensorMap x = tensor_map(s.x.data, DType::bf16, s.rows, s.V, s.x.stride, kTileDepth, 64);
  const CUtensorMap e =
      tensor_map(s.e.data, DType::bf16, s.rows, s.D, s.e.stride, kTileDepth / 2, 64);
  const CUtensorMap out = tensor_map(s.dc, DType::f32, s.V, s.D, s.dc_stride, 16, 32);
  launch_product<Transposed, AccumulateEpilogue>(x, e, out, params, {s.add},
                                                 multiprocessors / 2 * 2, stream);
}

}  // namespace cutloss::sm90
