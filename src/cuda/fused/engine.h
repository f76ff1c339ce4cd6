// The engine for Hopper, whose own TMA and WGMMA kernels (sm90/) do the row work where the logits
// are, and its algorithms.
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

extern const Engine cuda_fused_sm90_engine;

namespace cuda::fused {

extern const Algorithm forward_algorithm, exponentials, stored, by_vocabulary;

}  // namespace cuda::fused
}  // namespace cutloss
