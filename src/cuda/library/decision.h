#pragma once

#include <memory>

#include "cuda/decision.h"

namespace cutloss::cuda::library {

// Algorithm::decide of all of them.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& problem,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least);

// Pieces of a slab, and of the vocabulary, of whose exponentials a maximum each is kept.
std::int64_t pieces_per_slab(const CudaDecision& d);
std::int64_t pieces(const CudaDecision& d);

}  // namespace cutloss::cuda::library
