// Work on one row of logits within one slab of columns, vectorised for the processor that runs it.
// The row's part in the slab stays in L1 between the passes, so each option is a pass of its own
// and costs nothing where it is absent.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/transform.h"

namespace cutloss::cpu {

// z = softcap(dot + bias) * inv_temperature.
template <class T>
struct RowTransform {
  const T* bias = nullptr;  // the bias of the slab's columns, or null
  T softcap = 0;            // 0 where there is none
  T inv_temperature = 1;
  bool identity() const { return bias == nullptr && softcap == T(0) && inv_temperature == T(1); }
};

// The most columns of a slab: the slopes of a row wait on the stack while its maximum is looked
// for.
inline constexpr std::int64_t kMostColumns = 8192;

template <class T>
struct StatisticsRow {
  T* z;  // products of E and C, which become z, the target included
  std::int64_t columns;
  std::int64_t first_column;  // the slab's first, among all columns
  std::int64_t target;        // the target among all columns, or a number that none has
  RowTransform<T> transform;
  bool entropy;
  bool argmax;
  bool zbar;
  const T* class_weight;  // the weights of the slab's columns, or null for 1
  // Null, or where e^(z - slab_max) times the softcap's slope goes, and at the target the slope of
  // the whole transform: as T, or as bf16 where T is float. There are at most kMostColumns then.
  void* exponentials;
  DType exponentials_type;
  T slab_max;  // the largest logit but the target's: written
};

template <class T>
struct GradientRow {
  std::int64_t columns;
  std::int64_t target;  // the target's column in the slab, or -1
  T target_g;           // g at the target, without the transform's slope
  RowCoefficients<T> coefficients;
  const T* class_weight;  // the weights of the slab's columns, or null for 1
};

// The functions for rows of one stat dtype. A `type` is T's own, or bf16 where T is float.
template <class T>
struct RowOps {
  void (*statistics)(StatisticsRow<T>& row, RowState<T>& state);
  // Makes g from products of E and C, or from z where `transform` is null, which suffices without a
  // softcap. g may be z.
  void (*gradient)(const GradientRow<T>& row, T* z, const RowTransform<T>* transform, DType type,
                   void* g);
  // Makes g from the exponentials that `statistics` kept, whose slab maximum was `slab_max`. g has
  // their type, and may be in their place.
  void (*gradient_from_exponentials)(const GradientRow<T>& row, const void* exponentials,
                                     T slab_max, DType type, void* g);
  // sums[i] += values[first + i]
  void (*add)(DType type, const void* values, std::int64_t first, T* sums, std::int64_t count);
};

// The functions for the processor that runs them. T is float or double.
template <class T>
const RowOps<T>& row_ops();

// Conversions of contiguous values. bf16 and f16 are given as their bits.
void bf16_to_float(const std::uint16_t* from, float* to, std::int64_t count);
void float_to_bf16(const float* from, std::uint16_t* to, std::int64_t count);
void f16_to_float(const std::uint16_t* from, float* to, std::int64_t count);
void float_to_f16(const float* from, std::uint16_t* to, std::int64_t count);

// Leaves AVX-512 out of the choice. It must be called before any vector code has run.
void forbid_avx512();

// The name of the instruction set that the vector code was chosen for: "AVX3_ZEN4", "AVX2", ...
const char* vector_target();

}  // namespace cutloss::cpu
