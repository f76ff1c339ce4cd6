// What kernels share: launches that report failure, vectors of 16 bytes, conversions, sums of
// warps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/sizes.h"
#include "core/text.h"
#include "cuda/device.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kThreads = 256;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, std::int64_t blocks, int threads,
            cudaStream_t stream, Arguments&&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) {
    throw Error(ErrorCode::unsupported, text(name, ": ", blocks, " blocks are too many"));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

// Calls use(pointer to an element type) for a dtype.
template <class Use>
void for_type(DType type, Use use) {
  switch (type) {
    case DType::f32:
      return use(static_cast<float*>(nullptr));
    case DType::f64:
      return use(static_cast<double*>(nullptr));
    case DType::bf16:
      return use(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16:
      return use(static_cast<__half*>(nullptr));
  }
}

// Values that are loaded and stored together.
template <class E, int kCount>
struct alignas(sizeof(E) * kCount < 16 ? sizeof(E) * kCount : 16) Pack {
  E value[kCount];
};

template <class T, class E>
__device__ __forceinline__ T widen(E value) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    return static_cast<T>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<E, __half>) {
    return static_cast<T>(__half2float(value));
  } else {
    return static_cast<T>(value);
  }
}

// Rounds to nearest even; what is too large for fp16 becomes infinite.
template <class E, class T>
__device__ __forceinline__ E narrow(T value) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<E, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<E>(value);
  }
}

template <class T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(__builtin_huge_val());
}
template <class T>
__device__ __forceinline__ T not_a_number() {
  return static_cast<T>(__builtin_nan(""));
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

}  // namespace cutloss::cuda
