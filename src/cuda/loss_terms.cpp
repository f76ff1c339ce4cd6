// loss_terms of the public interface, on a device.
#include "core/loss_terms.h"

#include "cuda/row_facts.h"

namespace cutloss {

void cuda_loss_terms(const LossRows& rows, const Weighting& weighting, const void* targets,
                     const LossTerms& terms, void* stream) {
  const cuda::RowFacts facts = cuda::row_facts(rows.rows, rows.classes, targets);
  auto* on = static_cast<cudaStream_t>(stream);
  rows.type == DType::f64 ? cuda::loss_terms<double>(facts, weighting, terms, on)
                          : cuda::loss_terms<float>(facts, weighting, terms, on);
}

}  // namespace cutloss
