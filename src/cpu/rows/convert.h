// Conversions between the dtype in which a tensor is stored and the dtype of the products.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace cutloss::cpu {

// Converts `count` contiguous values, or copies them where both dtypes are the same. f64 converts
// to f64 only.
void convert(DType from_type, const void* from, DType to_type, void* to, std::int64_t count);

}  // namespace cutloss::cpu
