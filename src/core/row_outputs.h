// How the statistics of a row are written: to its outputs, as far as they are wanted, or as its
// open state.
#pragma once

#include "core/row_map.h"
#include "core/row_state.h"
#include "cutloss/call.h"
#include "cutloss/rows.h"

namespace cutloss {

// The outputs without those that are not wanted, which are not written even where there is room.
inline RowOutputs wanted_outputs(const Wanted& wanted, RowOutputs rows) {
  if (!wanted.state) rows.state = nullptr;
  if (!wanted.entropy) rows.entropy = nullptr;
  if (!wanted.zbar) rows.zbar = rows.zbar_centred = nullptr;
  if (!wanted.argmax) rows.argmax = nullptr;
  return rows;
}

template <class T>
CUTLOSS_HOST_DEVICE void write_row(const RowOutputs& out, std::int64_t n, const RowResult<T>& row) {
  const auto write = [n](void* array, T value) {
    if (array != nullptr) static_cast<T*>(array)[n] = value;
  };
  write(out.nll, row.nll);
  write(out.lse, row.lse);
  write(out.row_max, row.row_max);
  write(out.log_sum, row.log_sum);
  write(out.entropy, row.entropy);
  write(out.zbar, row.zbar);
  write(out.zbar_centred, row.zbar_centred);
  if (out.argmax != nullptr) out.argmax[n] = row.argmax;
}

// Writes a row that has no statistics: `value` is 0 where the row is ignored, NaN where nothing is
// known of it.
template <class T>
CUTLOSS_HOST_DEVICE void clear_row(const RowOutputs& out, std::int64_t n, T value) {
  write_row<T>(out, n, {value, value, value, value, value, value, value, -1});
  if (out.state == nullptr) return;
  RowState<T> state;
  state.sum = value;
  static_cast<RowState<T>*>(out.state)[n] = state;
}

// Closes a row, which may have no target here (a negative column): then the outputs that do not
// depend on the target stay right.
template <class T>
CUTLOSS_HOST_DEVICE RowResult<T> closed(RowState<T> state, std::int64_t column, T target_weight,
                                        std::int64_t V) {
  if (column >= 0) return close(state, column, target_weight, V);
  state.target_logit = -std::numeric_limits<T>::infinity();
  RowResult<T> row = close(state, column, T(0), V);
  row.nll = std::numeric_limits<T>::quiet_NaN();
  return row;
}

// Writes a row whose columns have all been seen, its target included where it is one of them.
// `target_weight` is the weight of the target's class.
template <class T>
CUTLOSS_HOST_DEVICE void finish_row(const RowOutputs& out, std::int64_t n, RowState<T> state,
                                    std::int64_t column, T target_weight, const Classes& classes) {
  if (out.state != nullptr) {
    if (state.argmax >= 0) state.argmax += classes.first;
    static_cast<RowState<T>*>(out.state)[n] = state;
    return;
  }
  write_row(out, n, closed(state, column, target_weight, classes.total));
}

// Merges the states of all shards to that of row n over the whole vocabulary.
template <class T>
CUTLOSS_HOST_DEVICE RowState<T> merged(const RowStates& s, std::int64_t n) {
  const auto* state = static_cast<const RowState<T>*>(s.states) + n;
  RowState<T> all = *state;
  for (std::int64_t k = 1; k < s.count; ++k) merge(all, state[k * s.stride]);
  return all;
}

}  // namespace cutloss
