// Finds how large a size may be, what its passes over memory cost, and where dE's sums lie.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/sizes.h"
#include "plan/decision.h"

namespace cutloss {

// The time of reading and writing fp32 sums once for each of `pieces`, in products of N x V x D.
// The pieces are slabs for dE and chunks of rows for dC; together they have `over` columns, or
// rows.
constexpr double passes_over_sums(double flops_per_byte, std::int64_t pieces, std::int64_t over) {
  return 4 * flops_per_byte * static_cast<double>(pieces) / static_cast<double>(over);
}

// Finds the largest size of `least`, least + unit, ... up to `most` for which bytes(size) is at
// most `budget`, or 0 where there is none. bytes must not fall as the size grows. The search
// halves, since the larger of two passes is no straight line.
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

// What the choice of a place for dE's sums depends on.
struct SumsSearch {
  std::int64_t budget;
  // dE's sums have a place already.
  bool in_place;
  // The first column whose rows of dC may hold them is a multiple of this.
  std::int64_t column_unit;
  // A chunk has at least so many rows, and is a multiple of the unit.
  std::int64_t least_chunk, chunk_unit;
};

// Chooses how gradients are made a slab of columns at a time. All rows are taken together, and dE's
// sums have memory of their own or lie in dC's last rows: whichever fits, or the quicker where both
// do. Where dC is not wanted and all rows are too much, as many rows as fit make a chunk.
// attempt(rows, last_begin) makes a trial, which may not fit, with bytes(trial) and time(trial);
// chunk_bytes(rows) says what a chunk takes at least.
template <class Attempt, class ChunkBytes, class BytesOf, class TimeOf>
auto with_sums_placed(const Decision& facts, const SumsSearch& s, Attempt attempt,
                      ChunkBytes chunk_bytes, BytesOf bytes, TimeOf time) {
  const std::int64_t rows = std::max<std::int64_t>(row_count(facts.problem), 1);
  const std::int64_t V = classes_of(facts.problem).count;
  auto own = attempt(rows, V);
  const bool fits = bytes(own) <= s.budget;
  if (!facts.problem.wanted.dc.wanted) {
    if (fits) return own;
    const std::int64_t chunk = largest_that_fits(s.least_chunk, std::max(rows, s.least_chunk),
                                                 s.chunk_unit, s.budget, chunk_bytes);
    return chunk == 0 ? own : attempt(chunk, V);
  }
  const std::int64_t begin = begin_of_last_columns(facts, s.in_place, s.column_unit);
  if (begin == V) return own;
  auto in_dc = attempt(rows, begin);
  const bool better = bytes(in_dc) <= s.budget && (!fits || time(in_dc) < time(own));
  return better ? in_dc : own;
}

}  // namespace cutloss
