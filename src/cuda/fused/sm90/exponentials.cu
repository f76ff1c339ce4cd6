#include "cuda/fused/sm90/epilogues/exponentials.cuh"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/launch.cuh"

namespace cutloss::cuda::fused::sm90 {

void launch_exponentials(const Logits& l, const Exponentials& x, const Grid& grid,
                         cudaStream_t stream) {
  const CUtensorMap out = tensor_map(x.x, DType::bf16, l.rows, l.columns, x.x_stride, 16, 64);
  const auto launch = [&]<class Epilogue>(Epilogue*) {
    const typename Epilogue::Params params{l.transform, l.target, x.reference, x.sum_and_max,
                                           (l.columns + kTileColumns - 1) / kTileColumns};
    launch_logits<LogitsConfig<cute::bfloat16_t>, Epilogue>(l, &out, params, grid, stream);
  };
  if (l.transform.softcap == 0.f) {
    launch(static_cast<ExponentialsEpilogue<false>*>(nullptr));
  } else {
    launch(static_cast<ExponentialsEpilogue<true>*>(nullptr));
  }
}

}  // namespace cutloss::cuda::fused::sm90
