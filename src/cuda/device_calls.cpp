// What CUDA devices do that takes no plan.
#include "cuda/device_calls.h"

#include "cuda/row_facts.h"

namespace cutloss {
namespace cuda {
namespace {

void loss_terms_of(const LossRows& rows, const Weighting& weighting, const void* targets,
                   const LossTerms& terms, void* stream) {
  const RowFacts facts = row_facts(rows.rows, rows.classes, targets);
  auto* on = static_cast<cudaStream_t>(stream);
  rows.type == DType::f64 ? loss_terms<double>(facts, weighting, terms, on)
                          : loss_terms<float>(facts, weighting, terms, on);
}

void sum_of(const LossSum& s, void* loss, void* stream) {
  const RowFacts facts = row_facts(s.rows.rows, s.rows.classes, s.targets);
  auto* on = static_cast<cudaStream_t>(stream);
  s.rows.type == DType::f64 ? sum_loss<double>(facts, s.out, s.upstream, s.undefined, loss, on)
                            : sum_loss<float>(facts, s.out, s.upstream, s.undefined, loss, on);
}

void scale_by(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
              void* stream) {
  scale(type, values, count, factor_type, factor, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace cuda

const DeviceCalls& cuda_calls() {
  static constexpr DeviceCalls calls{cuda::loss_terms_of, cuda::sum_of, cuda::logits,
                                     cuda::scale_by};
  return calls;
}

}  // namespace cutloss
