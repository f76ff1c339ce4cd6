// Sizes are solved for: the bytes of a call grow with each size in a straight line, but for what is
// rounded.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/sizes.h"

namespace cutloss {

// The time of reading and writing fp32 sums once for each of `pieces` (slabs for dE, chunks of rows
// for dC), in products of N x V x D: `over` is how many columns, or rows, the pieces cut.
constexpr double passes_over_sums(double flops_per_byte, std::int64_t pieces, std::int64_t over) {
  return 4 * flops_per_byte * static_cast<double>(pieces) / static_cast<double>(over);
}

// The largest size of `least`, least + unit, ... up to `most` for which bytes(size) is at most
// `budget`; 0 where there is none. bytes must not fall as the size grows.
template <class Bytes>
std::int64_t largest_that_fits(std::int64_t least, std::int64_t most, std::int64_t unit,
                               std::int64_t budget, Bytes bytes) {
  const std::int64_t of_least = bytes(least);
  if (of_least > budget) return 0;
  const std::int64_t steps = most > least ? (most - least) / unit : 0;
  if (steps == 0) return least;
  const std::int64_t of_most = bytes(least + steps * unit);
  if (of_most <= budget) return least + steps * unit;
  const double slope = static_cast<double>(of_most - of_least) / static_cast<double>(steps);
  auto fit = static_cast<std::int64_t>(static_cast<double>(budget - of_least) / slope);
  fit = std::min(fit + 1, steps - 1);  // rounding may leave room for one more
  while (fit > 0 && bytes(least + fit * unit) > budget) --fit;
  return least + fit * unit;
}

}  // namespace cutloss
