// The engine for every CUDA GPU: cuBLASLt products, own row kernels.
#pragma once

#include "core/engine.h"

namespace cutloss {

const Engine& cuda_library_engine();

namespace cuda {

// Why no CUDA engine can do a problem; empty where one may.
std::string common_refusal(const Problem& problem);

}  // namespace cuda
}  // namespace cutloss
