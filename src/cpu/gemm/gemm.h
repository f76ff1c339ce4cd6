// The matrix products, which libraries make. One call is one product: c = alpha a b, or c += alpha
// a b.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/matrix.h"
#include "cutloss/cutloss.h"

namespace cutloss::cpu {

struct Product {
  std::int64_t M = 0, N = 0, K = 0;
  Operand a;          // (M,K)
  Operand b;          // (K,N)
  void* c = nullptr;  // (M,N)
  std::int64_t c_stride = 0;
  DType type = DType::f32;    // the dtype of a and b: f32, bf16 or f64
  DType c_type = DType::f32;  // f32 (f64 with f64); bf16 with bf16 operands rounds the sums once
  double alpha = 1;
  bool accumulate = false;
};

// Says why oneDNN is not there, or nothing where it is. Without it only products in f64 work, and
// multiply_onednn, has_native_bf16, has_avx512 and describe_onednn must not be called.
std::string onednn_refusal();

// Throws Error(out_of_memory | internal) when the library fails.
void multiply_onednn(const Product& product);    // f32, bf16
void multiply_openblas(const Product& product);  // f64

inline void multiply(const Product& product) {
  product.type == DType::f64 ? multiply_openblas(product) : multiply_onednn(product);
}

// Whether products of bf16 operands run at bf16's speed here (AVX512_BF16 or AMX). Elsewhere the
// library throws, or is slower than with f32 operands.
bool has_native_bf16();
// Whether oneDNN may use AVX-512: the processor has it, and DNNL_MAX_CPU_ISA does not forbid it.
bool has_avx512();

// Whether a version of oneDNN multiplies bf16 rightly on AMX. Where the one here does not, it runs
// without AMX.
bool onednn_has_right_amx(int major, int minor);
// Whether a value of DNNL_MAX_CPU_ISA, empty where it is not set, lets oneDNN use AMX.
bool onednn_limit_allows_amx(std::string_view limit);

std::string describe_onednn();
std::string describe_openblas();

}  // namespace cutloss::cpu
