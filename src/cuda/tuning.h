// The sizes that both CUDA engines follow, with the reasons.
#pragma once

#include <cstdint>

#include "cuda/decision.h"

namespace cutloss::cuda {

// The most memory that cuBLASLt is given: more does not make a product quicker.
inline constexpr std::int64_t kMostLibraryBytes = 32 * kMiB;

// The rows and columns of dC's products in the last columns, where E is packed a block of rows at a
// time: the most rows that leave a slab of at least so many columns, in the memory that g had.
inline constexpr std::int64_t kMostLastRows = 2048;
inline constexpr std::int64_t kLeastLastRows = 256;
inline constexpr std::int64_t kLeastLastSlab = 512;

// How many operations of a product take as long as reading or writing one byte of sums beside it:
// plans foretell their time by it. A rough fit: what chunks of 1024 to 4096 rows cost by rows on an
// H200. It only orders plans.
inline constexpr double kFlopsPerByte = 90;

}  // namespace cutloss::cuda
