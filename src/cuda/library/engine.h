// The engine for every CUDA GPU: cuBLASLt products, own row kernels.
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

const Engine& cuda_library_engine();

}  // namespace cutloss
