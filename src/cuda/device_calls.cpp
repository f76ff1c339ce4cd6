// What CUDA devices do that takes no plan.
#include "cuda/device_calls.h"

#include "cuda/rows/row_facts.h"

namespace cutloss {
namespace cuda {
namespace {

void loss_terms_of(const LossRows& rows, const Weighting& weighting, const void* targets,
                   const LossTerms& terms, void* stream) {
  const RowFacts facts = row_facts(rows.rows, {0, rows.classes, rows.classes}, targets);
  auto* on = static_cast<cudaStream_t>(stream);
  rows.type == DType::f64 ? loss_terms<double>(facts, weighting, terms, on)
                          : loss_terms<float>(facts, weighting, terms, on);
}

void sum_of(const LossSum& s, void* loss, void* stream) {
  const RowFacts facts = row_facts(s.rows.rows, {0, s.rows.classes, s.rows.classes}, s.targets);
  auto* on = static_cast<cudaStream_t>(stream);
  s.rows.type == DType::f64 ? sum_loss<double>(facts, s.out, s.upstream, s.undefined, loss, on)
                            : sum_loss<float>(facts, s.out, s.upstream, s.undefined, loss, on);
}

void close_of(const LossRows& rows, const RowStates& states, const RowOutputs& out, void* stream) {
  const RowFacts facts = row_facts(rows.rows, {0, rows.classes, rows.classes}, states.targets);
  auto* on = static_cast<cudaStream_t>(stream);
  rows.type == DType::f64 ? close_shards<double>(facts, states, out, on)
                          : close_shards<float>(facts, states, out, on);
}

void empty_of(DType stat, std::int64_t rows, void* states, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  stat == DType::f64 ? empty_states(rows, static_cast<RowState<double>*>(states), on)
                     : empty_states(rows, static_cast<RowState<float>*>(states), on);
}

void scale_by(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
              void* stream) {
  scale(type, values, count, factor_type, factor, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace cuda

const DeviceCalls& cuda_calls() {
  static constexpr DeviceCalls calls{cuda::loss_terms_of, cuda::sum_of, cuda::close_of,
                                     cuda::empty_of,      cuda::logits, cuda::scale_by};
  return calls;
}

}  // namespace cutloss
