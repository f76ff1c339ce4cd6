// Forward's kernel, instance by instance: element type, what clusters share, which statistics.
#pragma once

#include "cuda/fused/sm90/epilogues/statistics.cuh"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/launch.cuh"

namespace cutloss::cuda::fused::sm90 {

// Where rows of E have positions, one of two kernels does the work. The device knows which.
#define CUTLOSS_STATISTICS_INSTANCE(Element, kShare, kAll)                                    \
  template <>                                                                                 \
  void launch_statistics_instance<Element, kShare == Share::rows, kAll>(                      \
      const Logits& l, const Statistics& s, const Grid& grid, cudaStream_t stream) {          \
    using Epilogue = StatisticsEpilogue<kAll>;                                                \
    const Epilogue::Params params{l.transform,    l.target,   l.origin,                       \
                                  s.target_logit, s.partials, s.class_weight};                \
    launch_logits<LogitsConfig<Element, kShare>, Epilogue>(l, nullptr, params, grid, stream); \
    if (l.positions == nullptr) return;                                                       \
    launch_logits<LogitsConfig<Element, kShare, true>, Epilogue>(l, nullptr, params, grid,    \
                                                                 stream);                     \
  }

}  // namespace cutloss::cuda::fused::sm90
