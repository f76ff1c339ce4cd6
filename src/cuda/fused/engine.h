// The engine for Hopper: own TMA and WGMMA kernels (sm90/), in which row work is done where the
// logits are.
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

extern const Engine cuda_fused_sm90_engine;

}  // namespace cutloss
