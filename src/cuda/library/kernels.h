// The row kernels that work on slabs of logits in memory: each function launches on a stream and
// returns. T is the stat dtype, float or double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/row_state.h"
#include "cuda/rows/row_table.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {

// Columns that one warp takes at a time; what is kept has a maximum for each such piece.
template <class T>
inline constexpr int kPieceColumns = 4096 / sizeof(T);

// A block of logits in memory: before bias, softcap and temperature.
template <class T>
struct LogitBlock {
  T* z = nullptr;
  std::int64_t stride = 0;  // a multiple of 16 bytes
  int rows = 0;
  int columns = 0;
  RowTable table;
  std::int64_t first_entry = 0;
  int first_column = 0;     // of the vocabulary
  const T* bias = nullptr;  // of these columns, or null
  T softcap = 0;            // 0: none
};

// What forward keeps for backward: a row-major matrix of the chunk's rows.
template <class T>
struct Kept {
  void* data = nullptr;  // the block's first row and column, or null
  std::int64_t stride = 0;
  DType type = DType::f32;
  bool exponentials = false;
  T* maxima = nullptr;  // of the block's first row and piece
  std::int64_t maxima_stride = 0;
};

// What e^(z - maximum) is multiplied with before it is kept: fp16 then holds 2^-38 of a maximum.
constexpr float kept_scale(DType type) { return type == DType::f16 ? 0x1p14f : 1.0f; }

template <class T>
struct SlabStatistics {
  LogitBlock<T> block;
  RowState<T>* states = nullptr;  // of the block's first row
  bool entropy = false, argmax = false, zbar = false;
  const T* class_weight = nullptr;  // of these columns, or null: ones
  Kept<T> kept;
};
template <class T>
void row_statistics(const SlabStatistics<T>& s, cudaStream_t stream);

template <class T>
struct SlabGradient {
  LogitBlock<T> block;                        // z: logits, or what is kept (as T)
  const RowGradient<T>* gradients = nullptr;  // of the block's first row
  const T* class_weight = nullptr;
  bool transformed = false;  // z is final: kept, without a softcap
  void* g = nullptr;
  std::int64_t g_stride = 0;
  DType g_type = DType::f32;
};
// g from logits.
template <class T>
void row_gradient(const SlabGradient<T>& s, cudaStream_t stream);

// g from kept exponentials; columns begin at a slab, `slab` columns to a slab. May be in place.
template <class T>
void row_gradient_from_exponentials(const SlabGradient<T>& s, const Kept<T>& kept,
                                    std::int64_t slab, cudaStream_t stream);

}  // namespace cutloss::cuda
