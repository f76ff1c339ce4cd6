// The kernel of backward by vocabulary, one instance for each element type.
#pragma once

#include "cuda/sm90/gradient_epilogue.cuh"
#include "cuda/sm90/launch.cuh"

namespace cutloss::sm90 {

template <class Element>
void launch_gradient_instance(const Logits& logits, const GradientOfLogits& gradient,
                              const Grid& grid, cudaStream_t stream);

#define CUTLOSS_GRADIENT_INSTANCE(Element)                                                       \
  template <>                                                                                    \
  void launch_gradient_instance<Element>(const Logits& l, const GradientOfLogits& g,             \
                                         const Grid& grid, cudaStream_t stream) {                \
    const CUtensorMap out = tensor_map(g.g, l.type, l.rows, l.columns, g.g_stride, 16, 64);      \
    const GradientEpilogue<Element>::Params params{l.transform, l.target,       l.origin,        \
                                                   g.row,       g.class_weight, g.per_element};  \
    launch_logits<LogitsConfig<Element, 2>, GradientEpilogue<Element>>(l, &out, params, grid,    \
                                                                       stream);                  \
  }

}  // namespace cutloss::sm90
