// The matrix products, by cuBLASLt: the library is opened at run time, the one that the process
// already holds (PyTorch's) before any other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/matrix.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {

// c = alpha a b, or c += alpha a b.
struct Product {
  std::int64_t M = 0, N = 0, K = 0;
  Operand a;          // (M,K)
  Operand b;          // (K,N)
  void* c = nullptr;  // (M,N)
  std::int64_t c_stride = 0;
  DType type = DType::f32;    // of a and b
  DType c_type = DType::f32;  // f32 (f64 with f64), or that of a and b; sums are fp32 (fp64) anyway
  double alpha = 1;
  const void* device_alpha = nullptr;  // where not null: alpha in device memory, then 0 and 1
  bool accumulate = false;
  bool tf32 = false;  // f32 operands may be rounded to tf32
  void* workspace = nullptr;
  std::int64_t workspace_bytes = 0;
};

// What lies in device memory at Product::device_alpha.
struct DeviceScalars {
  float alpha, zero, one;
  float scale, inv_scale;  // of g (gradient.cu)
};

// Throws Error(out_of_memory | unsupported | internal).
void multiply(const Product& product, cudaStream_t stream);

// Why there is no cuBLASLt, in words; empty where there is one, ready for the current device.
std::string cublaslt_refusal();
std::string describe_cublaslt();

}  // namespace cutloss::cuda
