// The engine for every CUDA GPU, with cuBLASLt's products and our own row kernels, and its
// algorithms.
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

extern const Engine cuda_library_engine;

namespace cuda::library {

extern const Algorithm forward_algorithm, by_rows, stored, by_vocabulary;

}  // namespace cuda::library
}  // namespace cutloss
