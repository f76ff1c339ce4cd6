// Descriptions of matrices for the bulk tensor copies.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cutloss/cutloss.h"

namespace cutloss::cuda::fused::sm90 {

// Describes a matrix. A box of `box_columns` by `box_rows` of a row-major matrix goes to shared
// memory (or comes from it) with its 16-byte chunks permuted within 128-byte rows, as the tensor
// cores read them. What lies outside the matrix reads as zero and is not written. Throws
// Error(internal) where the driver refuses the description.
CUtensorMap tensor_map(const void* data, DType type, std::int64_t rows, std::int64_t columns,
                       std::int64_t stride, int box_rows, int box_columns);

}  // namespace cutloss::cuda::fused::sm90
