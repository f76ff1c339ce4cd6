// loss_terms of the public interface, on a device.
#include "core/loss_terms.h"

#include <limits>

#include "core/dtype.h"
#include "core/text.h"
#include "cuda/common/kernels.h"

namespace cutloss {

void cuda_loss_terms(const Problem& p, const Weighting& weighting, const void* targets,
                     const LossTerms& terms, void* stream) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (p.sequences * p.length > kMost || p.V > kMost) {
    throw Error(ErrorCode::unsupported, text("sequences x length = ", p.sequences * p.length,
                                             " and V = ", p.V, " must be under 2^31"));
  }
  cuda::RowFacts facts;
  facts.targets = targets;
  facts.target_type = p.target_type;
  facts.ignore_index = p.ignore_index;
  facts.rows = static_cast<int>(row_count(p));
  facts.predicted = static_cast<int>(p.length - p.shift);
  facts.length = static_cast<int>(p.length);
  facts.shift = static_cast<int>(p.shift);
  facts.V = static_cast<int>(p.V);
  auto* on = static_cast<cudaStream_t>(stream);
  stat_type(p.compute_type) == DType::f64 ? cuda::loss_terms<double>(facts, weighting, terms, on)
                                          : cuda::loss_terms<float>(facts, weighting, terms, on);
}

}  // namespace cutloss
