// The engine for Hopper: the logits' products and the row work on them in kernels of its own.
#pragma once

#include "core/engine.h"

namespace cutloss {

const Engine& cuda_fused_sm90_engine();

}  // namespace cutloss
