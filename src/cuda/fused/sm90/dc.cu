#include "cuda/fused/sm90/accumulate_epilogue.cuh"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/launch.cuh"

namespace cutloss::cuda::fused::sm90 {
namespace {

template <class Out, Gather kGather>
void launch(const DcProduct& s, const Grid& grid, cudaStream_t stream) {
  // The rows of the list are the product's depth; columns (D) come fastest, since going down the
  // vocabulary first would read g again for each tile of D.
  using Transposed = Config<cute::bfloat16_t, Major::MN, Major::MN, Share::columns, kGather>;
  constexpr bool kFp32 = std::is_same_v<Out, float>;
  ProductParams params{};
  params.rows = s.V;
  params.columns = s.D;
  params.width = kTileColumns;
  params.depth = s.rows;
  params.count = s.count;
  params.first = s.first;
  params.count_is_depth = true;
  params.largest_group = 1;
  params.positions = s.positions;
  const auto rows_of_e = [&](int rows) {
    const std::int64_t all = s.positions == nullptr ? s.rows : s.e_rows;
    return tensor_map(s.e.data, DType::bf16, all, s.D, s.e.stride, rows, 64);
  };
  const CUtensorMap g = tensor_map(s.g.data, DType::bf16, s.rows, s.V, s.g.stride, kTileDepth, 64);
  const CUtensorMap out = tensor_map(s.dc, s.dc_type, s.V, s.D, s.D, 16, kFp32 ? 32 : 64);
  typename Transposed::MapOfRow row_of_e{};
  if constexpr (kGather == Gather::b) row_of_e = rows_of_e(1);
  const typename AccumulateEpilogue<Out>::Params epilogue{s.add, s.scale, s.sum_of_column, s.sums,
                                                          s.D};
  launch_product<Transposed, AccumulateEpilogue<Out>>(g, rows_of_e(kTileDepth / 2), out, row_of_e,
                                                      params, epilogue, grid.blocks, stream);
}

}  // namespace

void launch_dc(const DcProduct& s, const Grid& grid, cudaStream_t stream) {
  const bool finds = s.positions != nullptr;
  if (s.dc_type == DType::f32) {
    finds ? launch<float, Gather::b>(s, grid, stream)
          : launch<float, Gather::nothing>(s, grid, stream);
  } else {
    finds ? launch<cute::bfloat16_t, Gather::b>(s, grid, stream)
          : launch<cute::bfloat16_t, Gather::nothing>(s, grid, stream);
  }
}

}  // namespace cutloss::cuda::fused::sm90
