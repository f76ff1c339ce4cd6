// Where a row lies among the targets, and its entry of an array that may be absent.
#pragma once

#include <cstdint>

#include "cuda/common/kernels.h"

namespace cutloss::cuda {

__device__ inline std::int64_t position_of(const RowFacts& f, int n) {
  return std::int64_t{n / f.predicted} * f.length + n % f.predicted;
}

// The target that the row at a position predicts.
__device__ inline std::int64_t target_at(const RowFacts& f, std::int64_t position) {
  return f.target_type == IndexType::i64
             ? static_cast<const std::int64_t*>(f.targets)[position + f.shift]
             : static_cast<const std::int32_t*>(f.targets)[position + f.shift];
}

__device__ inline bool counts(const RowFacts& f, int n) {
  return target_at(f, position_of(f, n)) != f.ignore_index;
}

template <class T>
__device__ T read(const void* array, std::int64_t n) {
  return array == nullptr ? T(0) : static_cast<const T*>(array)[n];
}

}  // namespace cutloss::cuda
