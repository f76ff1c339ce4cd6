#include "cuda/sm90/accumulate_epilogue.cuh"
#include "cuda/sm90/launch.cuh"

namespace cutloss::sm90 {

void launch_dc(const DcProduct& s, const Grid& grid, cudaStream_t stream) {
  // The rows of the list are the product's depth; columns (D) come fastest, since going down the
  // vocabulary first would read g again for each tile of D.
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
  const CUtensorMap g = tensor_map(s.g.data, DType::bf16, s.rows, s.V, s.g.stride, kTileDepth, 64);
  const CUtensorMap e =
      tensor_map(s.e.data, DType::bf16, s.rows, s.D, s.e.stride, kTileDepth / 2, 64);
  const auto launch = [&]<class Out>(Out*, int box_columns) {
    const CUtensorMap out = tensor_map(s.dc, s.dc_type, s.V, s.D, s.D, 16, box_columns);
    const typename AccumulateEpilogue<Out>::Params epilogue{s.add, s.scale, s.sum_of_column, s.sums,
                                                            s.D};
    launch_product<Transposed, AccumulateEpilogue<Out>>(g, e, out, params, epilogue, grid.blocks,
                                                        stream);
  };
  if (s.dc_type == DType::f32) {
    launch(static_cast<float*>(nullptr), 32);
  } else {
    launch(static_cast<cute::bfloat16_t*>(nullptr), 64);
  }
}

}  // namespace cutloss::sm90
