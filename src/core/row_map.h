// Where the rows of a loss lie among the positions of its sequences, written once for host and
// device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/logit_math.h"
#include "cutloss/problem.h"

namespace cutloss {

// I is the type that counts rows: std::int64_t on the host, int on a device.
template <class I>
struct RowMap {
  I length = 0;     // how many positions a sequence has
  I predicted = 0;  // how many of them, the first ones, are rows
  I shift = 0;      // how far behind a row's position that of its target lies

  CUTLOSS_HOST_DEVICE I sequence(I row) const { return row / predicted; }
  CUTLOSS_HOST_DEVICE I column(I row) const { return row % predicted; }
  CUTLOSS_HOST_DEVICE I row(I sequence, I column) const { return sequence * predicted + column; }

  // A row's position, and its target's, counted through all sequences.
  CUTLOSS_HOST_DEVICE std::int64_t position(I row) const {
    return std::int64_t{sequence(row)} * length + column(row);
  }
  CUTLOSS_HOST_DEVICE std::int64_t target(I row) const { return position(row) + shift; }
};

// A sequence that is no longer than the shift predicts nothing, however long the shift is.
inline std::int64_t settled_shift(const Rows& rows) { return std::min(rows.shift, rows.length); }

template <class I>
RowMap<I> row_map(const Rows& rows) {
  const std::int64_t shift = settled_shift(rows);
  return {static_cast<I>(rows.length), static_cast<I>(rows.length - shift), static_cast<I>(shift)};
}

// A row's target as a column of some classes is >= 0, or one of these two numbers, which no column
// equals.
inline constexpr int kWrongTarget = -1;      // outside of the vocabulary
inline constexpr int kTargetElsewhere = -2;  // in another shard

inline CUTLOSS_HOST_DEVICE std::int64_t column_of(std::int64_t target, const Classes& classes) {
  if (target < 0 || target >= classes.total) return kWrongTarget;
  const std::int64_t column = target - classes.first;
  return column >= 0 && column < classes.count ? column : kTargetElsewhere;
}

// The target at a position.
inline CUTLOSS_HOST_DEVICE std::int64_t target_at(const void* targets, IndexType type,
                                                  std::int64_t position) {
  return type == IndexType::i64 ? static_cast<const std::int64_t*>(targets)[position]
                                : static_cast<const std::int32_t*>(targets)[position];
}

}  // namespace cutloss
