// A piece of a row of logits in the registers of one warp. It has kPieceColumns columns, of which a
// lane holds vectors of 16 bytes, 32 vectors apart. Nothing is read beyond the row's stride.
#pragma once

#include <cmath>

#include "core/transform.h"
#include "cuda/library/kernels.h"
#include "cuda/math.cuh"

namespace cutloss::cuda {

template <class T>
struct Piece {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kVectors = kPieceColumns<T> / (32 * kVector);
  static constexpr int kValues = kVectors * kVector;

  // The column of value i, counted from the piece's first.
  static __device__ __forceinline__ int column(int i) {
    return (i / kVector * 32 + static_cast<int>(threadIdx.x % 32)) * kVector + i % kVector;
  }
};

// Calls use(pointer to an element type) for a dtype in which numbers of the stat dtype T are
// stored.
template <class T, class Use>
void for_stored_type(DType type, Use use) {
  if constexpr (std::is_same_v<T, double>) {
    use(static_cast<double*>(nullptr));
  } else if (type == DType::bf16) {
    use(static_cast<__nv_bfloat16*>(nullptr));
  } else if (type == DType::f16) {
    use(static_cast<__half*>(nullptr));
  } else {
    use(static_cast<float*>(nullptr));
  }
}

// Reads a piece. `columns` is the number from the piece's first to the end of the row.
template <class T>
__device__ __forceinline__ void load_piece(const T* from, int columns,
                                           T (&value)[Piece<T>::kValues]) {
  using P = Piece<T>;
#pragma unroll
  for (int j = 0; j < P::kVectors; ++j) {
    Pack<T, P::kVector> pack{};
    const int column = P::column(j * P::kVector);
    if (column < columns) pack = *reinterpret_cast<const Pack<T, P::kVector>*>(from + column);
#pragma unroll
    for (int k = 0; k < P::kVector; ++k) value[j * P::kVector + k] = pack.value[k];
  }
}

// Writes whole vectors: up to 15 bytes of the row's padding too.
template <class E, class T>
__device__ __forceinline__ void store_piece(const T (&value)[Piece<T>::kValues], E* to,
                                            int columns) {
  using P = Piece<T>;
#pragma unroll
  for (int j = 0; j < P::kVectors; ++j) {
    Pack<E, P::kVector> pack;
#pragma unroll
    for (int k = 0; k < P::kVector; ++k) pack.value[k] = narrow<E>(value[j * P::kVector + k]);
    const int column = P::column(j * P::kVector);
    if (column < columns) *reinterpret_cast<Pack<E, P::kVector>*>(to + column) = pack;
  }
}

// Adds the bias, which points to that of the piece's first column, or is null.
template <class T>
__device__ __forceinline__ void add_bias(T (&value)[Piece<T>::kValues], const T* bias,
                                         int columns) {
  using P = Piece<T>;
  if (bias == nullptr) return;
#pragma unroll
  for (int i = 0; i < P::kValues; ++i) {
    if (P::column(i) < columns) value[i] += bias[P::column(i)];
  }
}

// Makes z = softcap(a + bias) * inv_temperature.
template <class T>
__device__ __forceinline__ void transform_piece(T (&value)[Piece<T>::kValues], const T* bias,
                                                T softcap, T inv_temperature, int columns) {
  using P = Piece<T>;
  add_bias(value, bias, columns);
  if (softcap != T(0)) {
    const T inverse = T(1) / softcap;
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) value[i] = softcap * std::tanh(value[i] * inverse);
  }
#pragma unroll
  for (int i = 0; i < P::kValues; ++i) value[i] *= inv_temperature;
}

}  // namespace cutloss::cuda
