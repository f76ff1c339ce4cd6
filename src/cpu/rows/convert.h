// Conversions between the dtype in which a tensor is stored and the dtype of the products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace cutloss::cpu {

// `count` contiguous values. Same dtype: a copy. f64 converts to f64 only.
void convert(DType from_type, const void* from, DType to_type, void* to, std::int64_t count);

// The address `elements` past a base.
inline const void* at(const void* base, DType type, std::int64_t elements) {
  return static_cast<const std::byte*>(base) + elements * size_of(type);
}
inline void* at(void* base, DType type, std::int64_t elements) {
  return static_cast<std::byte*>(base) + elements * size_of(type);
}

}  // namespace cutloss::cpu
