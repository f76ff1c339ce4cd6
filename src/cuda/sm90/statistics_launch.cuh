// Forward's kernel, instance by instance: element type, blocks in a cluster, which statistics.
#pragma once

#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/statistics_epilogue.cuh"

namespace cutloss::sm90 {

template <class Element, int kCluster, bool kAll>
void launch_statistics_instance(const Logits& logits, const Statistics& statistics,
                                const Grid& grid, cudaStream_t stream);

#define CUTLOSS_STATISTICS_INSTANCE(Element, kCluster, kAll)                                    \
  template <>                                                                                   \
  void launch_statistics_instance<Element, kCluster, kAll>(                                     \
      const Logits& l, const Statistics& s, const Grid& grid, cudaStream_t stream) {            \
    using Epilogue = StatisticsEpilogue<kCluster, kAll>;                                        \
    const Epilogue::Params params{l.transform,    l.target,   l.origin,                         \
                                  s.target_logit, s.partials, s.class_weight};                  \
    if (l.positions == nullptr) {                                                               \
      launch_logits<LogitsConfig<Element, kCluster>, Epilogue>(l, nullptr, params, grid, stream); \
    } else {                                                                                    \
      launch_logits<LogitsConfig<Element, kCluster, true>, Epilogue>(l, nullptr, params, grid,  \
                                                                     stream);                   \
    }                                                                                           \
  }

}  // namespace cutloss::sm90
