// How kernels read a row's target, its temperature, and an array that may be absent.
#pragma once

#include <cstdint>

#include "cuda/math.cuh"
#include "cuda/rows/kernels.h"

namespace cutloss::cuda {

// The target that the row at a position predicts.
__device__ inline std::int64_t target_at(const RowFacts& f, std::int64_t position) {
  return cutloss::target_at(f.targets, f.target_type, position + f.map.shift);
}

__device__ inline std::int64_t target_of(const RowFacts& f, int n) {
  return target_at(f, f.map.position(n));
}

__device__ inline bool counts(const RowFacts& f, int n) {
  return target_of(f, n) != f.ignore_index;
}

// The row's inverse temperature, or NaN where its temperature is not usable.
template <class T>
__device__ T inv_temperature(const RowFacts& f, int n) {
  const double own =
      f.temperature != nullptr ? static_cast<double>(static_cast<const T*>(f.temperature)[n]) : 1.0;
  const double in_all = own * f.temperature_scale;
  return in_all >= f.least && in_all <= f.most ? static_cast<T>(1.0 / in_all) : not_a_number<T>();
}

template <class T>
__device__ T read(const void* array, std::int64_t n) {
  return array == nullptr ? T(0) : static_cast<const T*>(array)[n];
}

}  // namespace cutloss::cuda
