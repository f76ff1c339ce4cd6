// Sizes that both CUDA engines go by, and why.
#pragma once

#include <cstdint>

#include "cuda/decision.h"

namespace cutloss::cuda {

// cuBLASLt's workspace: more does not make a product quicker.
inline constexpr std::int64_t kMostLibraryBytes = 32 * kMiB;

// Of dC in the last columns, where E is packed a block of rows at a time: the most rows that leave
// a slab of so many columns, in the memory that g had.
inline constexpr std::int64_t kMostLastRows = 2048;
inline constexpr std::int64_t kLeastLastRows = 256;
inline constexpr std::int64_t kLeastLastSlab = 512;

// Products pass by for a byte of sums that is read or written beside them: what a plan's time is
// foretold by. From by rows on an H200, D 4096: 3.47 products with chunks of 1024 rows, 3.23 of
// 2048, 3.12 of 4096.
inline constexpr double kFlopsPerByte = 90;

}  // namespace cutloss::cuda
