// The arithmetic on sizes that every plan needs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cutloss {

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

// The size of equal pieces of `total`, as large as `most` allows: a multiple of `unit`, but for the
// last piece, which may be smaller.
constexpr std::int64_t even_piece(std::int64_t total, std::int64_t most, std::int64_t unit) {
  if (total <= most) return std::max<std::int64_t>(total, 1);
  const std::int64_t whole = std::max(most / unit * unit, unit);
  return round_up(divide_up(total, divide_up(total, whole)), unit);
}

}  // namespace cutloss
