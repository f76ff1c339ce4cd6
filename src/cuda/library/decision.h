#pragma once

#include <memory>

#include "cuda/decision.h"

namespace cutloss::cuda::library {

// The decision of the algorithm that goes `way`. What Algorithm::decide returns.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, Way way, const Problem& problem,
                                       std::int64_t budget, std::int64_t& least);

// Pieces of a slab, and of the vocabulary, of whose exponentials a maximum each is kept.
std::int64_t pieces_per_slab(const CudaDecision& d);
std::int64_t pieces(const CudaDecision& d);

}  // namespace cutloss::cuda::library
