// Work on one row of logits within one slab of columns, vectorised for the processor that runs
// it. A row segment stays in L1 between the passes, so each option is a pass of its own and
// costs nothing where it is absent.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/transform.h"

namespace cutloss::cpu {

// z = softcap(dot + bias) * inv_temperature.
template <class T>
struct RowTransform {
  const T* bias = nullptr;  // of the slab's columns, or null
  T softcap = 0;            // 0: none
  T inv_temperature = 1;
  bool identity() const { return bias == nullptr && softcap == T(0) && inv_temperature == T(1); }
};

// Columns of a slab, at most: the slopes of a row wait on the stack while its maximum is looked
// for.
inline constexpr std::int64_t kMostColumns = 8192;

template <class T>
struct StatisticsRow {
  T* z;  // in: products of E and C; out: z, the target included
  std::int64_t columns;
  std::int64_t first_column;  // among all columns
  std::int64_t target;        // the same, or none of them
  RowTransform<T> transform;
  bool entropy;
  bool argmax;
  bool zbar;
  const T* class_weight;  // of the slab's columns, or null for 1
  // Null, or where e^(z - slab_max) times the softcap's slope goes, and at the target the slope of
  // the whole transform: as T, or as bf16 where T is float. There are at most kMostColumns then.
  void* exponentials;
  DType exponentials_type;
  T slab_max;  // the largest logit but the target's: written
};

template <class T>
struct GradientRow {
  std::int64_t columns;
  std::int64_t target;  // in the slab, or -1
  T target_g;           // g there, but for the transform's slope
  RowCoefficients<T> coefficients;
  const T* class_weight;  // of the slab's columns, or null for 1
};

// The functions for rows of one stat dtype. A `type` is T's own, or bf16 where T is float.
template <class T>
struct RowOps {
  void (*statistics)(StatisticsRow<T>& row, RowState<T>& state);
  // g from products of E and C, or from z where `transform` is null: without a softcap that will
  // do. g may be z.
  void (*gradient)(const GradientRow<T>& row, T* z, const RowTransform<T>* transform, DType type,
                   void* g);
  // g from the exponentials that `statistics` kept, whose slab maximum was `slab_max`. g has their
  // type, and may be in their place.
  void (*gradient_from_exponentials)(const GradientRow<T>& row, const void* exponentials,
                                     T slab_max, DType type, void* g);
  // sums[i] += values[first + i]
  void (*add)(DType type, const void* values, std::int64_t first, T* sums, std::int64_t count);
};

// Those for the processor that runs them. T: float or double.
template <class T>
const RowOps<T>& row_ops();

// Conversions of contiguous values; bf16 and f16 as their bits.
void bf16_to_float(const std::uint16_t* from, float* to, std::int64_t count);
void float_to_bf16(const float* from, std::uint16_t* to, std::int64_t count);
void f16_to_float(const std::uint16_t* from, float* to, std::int64_t count);
void float_to_f16(const float* from, std::uint16_t* to, std::int64_t count);

// Leaves AVX-512 out of the choice. To be called before any vector code has run.
void forbid_avx512();

// What the vector code was chosen for: "AVX3_ZEN4", "AVX2", ...
const char* vector_target();

}  // namespace cutloss::cpu
