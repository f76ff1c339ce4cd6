// Rows that are closed after their statistics: those of a vocabulary in shards.
#include "core/dtype.h"
#include "core/row_outputs.h"
#include "core/validate.h"
#include "cpu/device_calls.h"

namespace cutloss::cpu {
namespace {

template <class T>
void close_all(const RowClosing& c) {
  const Rows& rows = c.problem.rows;
  const std::int64_t total = classes_of(c.problem).total;
  const RowMap<std::int64_t> map = row_map<std::int64_t>(rows);
  const auto target = [&](std::int64_t n) {
    return target_at(c.args.in.targets, rows.target_type, map.target(n));
  };
  const std::int64_t N = row_count(rows);
  const std::int64_t count = c.some.rows == nullptr ? N : c.some.count;
  const auto row = [&](std::int64_t i) { return c.some.rows == nullptr ? i : c.some.rows[i]; };
  for (std::int64_t i = 0; i < count; ++i) {  // before anything is written
    const std::int64_t n = row(i);
    if (n < 0 || target(n) == rows.ignore_index) continue;
    check_target(target(n), total, rows.ignore_index,
                 {map.sequence(n), map.column(n) + map.shift});
  }
  Wanted wanted = c.problem.wanted;
  wanted.state = false;
  const RowOutputs out = wanted_outputs(wanted, c.args.rows);
  const auto* weights =
      c.problem.has_class_weight ? static_cast<const T*>(c.args.in.class_weight) : nullptr;
  const auto* states = static_cast<const RowState<T>*>(c.states);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = row(i);
    if (n < 0) continue;
    const std::int64_t own = target(n);
    if (own == rows.ignore_index) {
      clear_row(out, n, T(0));
    } else {
      finish_row(out, n, merged(states, c.count, N, n), own, weights == nullptr ? T(1) : weights[own],
                 Classes{0, total, total});
    }
  }
}

template <class T>
void clear_all(std::int64_t rows, void* states) {
  for (std::int64_t n = 0; n < rows; ++n) static_cast<RowState<T>*>(states)[n] = {};
}

}  // namespace

void close_rows(const RowClosing& closing) {
  stat_type(closing.problem) == DType::f64 ? close_all<double>(closing) : close_all<float>(closing);
}

void empty_states(DType stat, std::int64_t rows, void* states, void* /*stream*/) {
  stat == DType::f64 ? clear_all<double>(rows, states) : clear_all<float>(rows, states);
}

}  // namespace cutloss::cpu
