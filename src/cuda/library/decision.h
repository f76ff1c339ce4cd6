// How the algorithms of cuda/library decide their sizes.
#pragma once

#include <memory>

#include "cuda/decision.h"

namespace cutloss::cuda::library {

// Algorithm::decide of all algorithms of the engine.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& problem,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least);

// How many pieces a slab has, and the vocabulary. Of each piece's exponentials a maximum is kept.
std::int64_t pieces_per_slab(const CudaDecision& d);
std::int64_t pieces(const CudaDecision& d);

}  // namespace cutloss::cuda::library
