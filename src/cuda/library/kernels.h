// The row kernels that work on slabs of logits in memory. Each function launches a kernel on a
// stream and returns. T is the stat dtype, float or double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/row_state.h"
#include "cuda/rows/row_table.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {

// How many columns one warp takes at a time. What is kept has a maximum for each such piece.
template <class T>
inline constexpr int kPieceColumns = 4096 / sizeof(T);

// A block of logits in memory, to which bias, softcap and temperature are not yet applied.
template <class T>
struct LogitBlock {
  T* z = nullptr;
  std::int64_t stride = 0;  // a multiple of 16 bytes
  int rows = 0;
  int columns = 0;
  RowTable table;
  std::int64_t first_entry = 0;
  int first_column = 0;     // the block's first column in the vocabulary
  const T* bias = nullptr;  // the bias of these columns, or null
  T softcap = 0;            // 0 where there is none
};

// What forward keeps for backward, a row-major matrix of the chunk's rows.
template <class T>
struct Kept {
  void* data = nullptr;  // the block's first row and column, or null
  std::int64_t stride = 0;
  DType type = DType::f32;
  bool exponentials = false;
  T* maxima = nullptr;  // that of the block's first row and piece
  std::int64_t maxima_stride = 0;
};

// The factor that e^(z - maximum) gets before it is kept: fp16 then holds 2^-38 of a maximum.
constexpr float kept_scale(DType type) { return type == DType::f16 ? 0x1p14f : 1.0f; }

template <class T>
struct SlabStatistics {
  LogitBlock<T> block;
  RowState<T>* states = nullptr;  // that of the block's first row
  bool entropy = false, argmax = false, zbar = false;
  const T* class_weight = nullptr;  // the weights of these columns, or null for ones
  Kept<T> kept;
};
template <class T>
void row_statistics(const SlabStatistics<T>& s, cudaStream_t stream);

template <class T>
struct SlabGradient {
  LogitBlock<T> block;                        // its z are logits, or what is kept, as T
  const RowGradient<T>* gradients = nullptr;  // those of the block's first row on
  const T* class_weight = nullptr;
  bool transformed = false;  // z is kept without a softcap, so the transform is applied already
  void* g = nullptr;
  std::int64_t g_stride = 0;
  DType g_type = DType::f32;
};
// Makes g from logits.
template <class T>
void row_gradient(const SlabGradient<T>& s, cudaStream_t stream);

// Makes g from kept exponentials, maybe in their place. The block begins with a slab, and a slab
// has `slab` columns.
template <class T>
void row_gradient_from_exponentials(const SlabGradient<T>& s, const Kept<T>& kept,
                                    std::int64_t slab, cudaStream_t stream);

}  // namespace cutloss::cuda
