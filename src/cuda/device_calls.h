// What CUDA devices do that takes no plan.
#pragma once

#include "core/device_calls.h"

namespace cutloss {

const DeviceCalls& cuda_calls();

namespace cuda {

void loss_terms(const LossRows& rows, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream);
void sum_loss(const LossSum& sum, void* loss, void* stream);
void close_rows(const LossRows& rows, const RowStates& states, const RowOutputs& out, void* stream);
void empty_states(DType stat, std::int64_t rows, void* states, void* stream);
void logits(const Problem& problem, const LogitsArgs& args, Pass pass);
void scale(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
           void* stream);

}  // namespace cuda
}  // namespace cutloss
