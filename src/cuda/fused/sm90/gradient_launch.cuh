// The kernel of backward by vocabulary, instance by instance. Where rows of E have positions, which
// bf16 alone allows, one of two kernels does the work, as in forward.
#pragma once

#include "cuda/fused/sm90/epilogues/gradient.cuh"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/launch.cuh"

namespace cutloss::cuda::fused::sm90 {

#define CUTLOSS_GRADIENT_INSTANCE(Element, kKind)                                                 \
  template <>                                                                                     \
  void launch_gradient_instance<Element, kKind>(const Logits& l, const GradientOfLogits& g,       \
                                                const Grid& grid, cudaStream_t stream) {          \
    using Epilogue = GradientEpilogue<Element, kKind>;                                            \
    const CUtensorMap out = tensor_map(g.g, l.type, l.rows, l.columns, g.g_stride, 16, 64);       \
    const Epilogue::Params params{l.transform, l.target, l.origin, g.row, g.class_weight};        \
    launch_logits<LogitsConfig<Element>, Epilogue>(l, &out, params, grid, stream);                \
    if constexpr (std::is_same_v<Element, cute::bfloat16_t>) {                                    \
      if (l.positions == nullptr) return;                                                         \
      launch_logits<LogitsConfig<Element, Share::columns, true>, Epilogue>(l, &out, params, grid, \
                                                                           stream);               \
    }                                                                                             \
  }

}  // namespace cutloss::cuda::fused::sm90
