#include "cuda/fused/sm90/accumulate_launch.cuh"
#include "cuda/fused/sm90/instances.h"

namespace cutloss::cuda::fused::sm90 {
namespace {

template <class Out, Gather kGather>
void launch(const DcProduct& s, const Grid& grid, cudaStream_t stream) {
  using Transposed = DcConfig<kGather>;
  const Accumulated o = operands_of(s);
  typename Transposed::MapOfRow row_of_e{};
  if constexpr (kGather == Gather::b) row_of_e = rows_of_e(s, 1);
  launch_product<Transposed, AccumulateEpilogue<Out>>(o.a, o.b, o.out, row_of_e, o.params,
                                                      o.epilogue, grid.blocks, stream);
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
