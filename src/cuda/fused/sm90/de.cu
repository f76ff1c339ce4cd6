#include "cuda/fused/sm90/accumulate_launch.cuh"
#include "cuda/fused/sm90/instances.h"

namespace cutloss::cuda::fused::sm90 {

void launch_de(const DeProduct& s, const Grid& grid, cudaStream_t stream) {
  const Accumulated o = operands_of(s);
  launch_product<DeConfig, AccumulateEpilogue<float>>(o.a, o.b, o.out, {}, o.params, o.epilogue,
                                                      grid.blocks, stream);
}

}  // namespace cutloss::cuda::fused::sm90
