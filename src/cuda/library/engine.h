// The engine for every CUDA GPU: cuBLASLt's products, own row kernels.
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

extern const Engine cuda_library_engine;

}  // namespace cutloss
