// The matrix products, which cuBLASLt makes. The library is opened at run time: the one that the
// process already holds (PyTorch's) is preferred to any other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/matrix.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {

// A product: c = alpha a b, or c += alpha a b.
struct Product {
  std::int64_t M = 0, N = 0, K = 0;
  Operand a;          // (M,K)
  Operand b;          // (K,N)
  void* c = nullptr;  // (M,N)
  std::int64_t c_stride = 0;
  DType type = DType::f32;    // the dtype of a and b
  DType c_type = DType::f32;  // f32 (f64 with f64), or that of a and b; sums are fp32 (fp64) anyway
  double alpha = 1;
  const void* device_alpha = nullptr;  // null, or DeviceScalars to take alpha from
  bool accumulate = false;
  bool tf32 = false;  // f32 operands may be rounded to tf32
  void* workspace = nullptr;
  std::int64_t workspace_bytes = 0;
};

// The numbers in device memory at Product::device_alpha, and the scale of g beside them.
struct DeviceScalars {
  float alpha, zero, one;
  float scale, inv_scale;  // the scale that g carries, and its inverse
};

// Throws Error(out_of_memory | unsupported | internal).
void multiply(const Product& product, cudaStream_t stream);

// Says why there is no cuBLASLt, or nothing where there is one, ready for the current device.
std::string cublaslt_refusal();
std::string describe_cublaslt();

}  // namespace cutloss::cuda
