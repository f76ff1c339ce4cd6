// How large a size may be, and what its passes over memory cost.
#pragma once

#include <cstdint>

#include "core/sizes.h"

namespace cutloss {

// The time of reading and writing fp32 sums once for each of `pieces` (slabs for dE, chunks of rows
// for dC), in products of N x V x D: `over` is how many columns, or rows, the pieces cut.
constexpr double passes_over_sums(double flops_per_byte, std::int64_t pieces, std::int64_t over) {
  return 4 * flops_per_byte * static_cast<double>(pieces) / static_cast<double>(over);
}

// The largest size of `least`, least + unit, ... up to `most` for which bytes(size) is at most
// `budget`; 0 where there is none. bytes must not fall as the size grows: by halving, since the
// larger of two passes is no straight line.
template <class Bytes>
std::int64_t largest_that_fits(std::int64_t least, std::int64_t most, std::int64_t unit,
                               std::int64_t budget, Bytes bytes) {
  if (bytes(least) > budget) return 0;
  std::int64_t fits = 0, fails = most > least ? (most - least) / unit + 1 : 1;
  while (fails - fits > 1) {
    const std::int64_t middle = fits + (fails - fits) / 2;
    (bytes(least + middle * unit) <= budget ? fits : fails) = middle;
  }
  return least + fits * unit;
}

}  // namespace cutloss
