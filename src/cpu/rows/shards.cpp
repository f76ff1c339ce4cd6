// Closes rows after their statistics, which are those of a vocabulary in shards.
#include <algorithm>
#include <limits>

#include "core/dtype.h"
#include "core/row_outputs.h"
#include "core/validate.h"
#include "cpu/device_calls.h"

namespace cutloss::cpu {
namespace {

template <class T>
void close_all(const LossRows& given, const RowStates& s, const RowOutputs& out) {
  const Rows& rows = given.rows;
  const RowMap<std::int64_t> map = row_map<std::int64_t>(rows);
  const auto target = [&](std::int64_t n) {
    return target_at(s.targets, rows.target_type, map.target(n));
  };
  const bool all = s.some.rows == nullptr;
  const std::int64_t N = row_count(rows), count = all ? N : s.some.count;
  const auto row = [&](std::int64_t i) { return all ? i : s.some.rows[i]; };
  for (std::int64_t i = 0; i < count; ++i) {  // all targets are checked before anything is written
    const std::int64_t n = row(i);
    if (n < 0 || target(n) == rows.ignore_index) continue;
    check_target(target(n), given.classes, rows.ignore_index,
                 {map.sequence(n), map.column(n) + map.shift});
  }
  const auto* weight = static_cast<const T*>(s.class_weight);
  const bool is_right = s.is_right == nullptr || *s.is_right;
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = row(i);
    if (n < 0) continue;
    const std::int64_t own = target(n);
    if (!is_right || own == rows.ignore_index) {
      clear_row(out, n, is_right ? T(0) : std::numeric_limits<T>::quiet_NaN());
    } else {
      write_row(
          out, n,
          closed(merged<T>(s, n), own, weight == nullptr ? T(1) : weight[own], given.classes));
    }
  }
}

}  // namespace

void close_rows(const LossRows& rows, const RowStates& states, const RowOutputs& out,
                void* /*stream*/) {
  for_stat(rows.type, [&]<class T>(T*) { close_all<T>(rows, states, out); });
}

void empty_states(DType stat, std::int64_t rows, void* states, void* /*stream*/) {
  for_stat(stat, [&]<class T>(T*) {
    std::fill_n(static_cast<RowState<T>*>(states), rows, RowState<T>{});
  });
}

}  // namespace cutloss::cpu
