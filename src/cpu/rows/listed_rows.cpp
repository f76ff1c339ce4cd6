#include "cpu/rows/listed_rows.h"

#include "core/validate.h"

namespace cutloss::cpu {

template <class T>
ListedRows<T>::ListedRows(const Call& call)
    : call_(call),
      map_(row_map<std::int64_t>(call.p.rows)),
      list_(call.buffer<std::int64_t>(buffer::kRowList)) {}

template <class T>
void ListedRows<T>::list() {
  std::int64_t count = 0;
  const std::int64_t rows = row_count(call_.p);
  for (std::int64_t n = 0; n < rows; ++n) {
    const std::int64_t of_row = target(n);
    if (of_row == call_.p.rows.ignore_index) continue;
    check(n, of_row);
    list_[1 + count++] = n;
  }
  list_[0] = count;
}

template <class T>
void ListedRows<T>::check(std::int64_t n, std::int64_t target) const {
  const Problem& p = call_.p;
  const Position at{map_.sequence(n), map_.column(n) + map_.shift};
  check_target(target, call_.head.classes.total, p.rows.ignore_index, at);
  if (!p.rows.has_temperature) return;
  const double own = static_cast<const T*>(call_.args.in.temperature)[n];
  check_row_temperature(own, own * p.transform.temperature, call_.d.stat, at);
}

template <class T>
void ListedRows<T>::clear_ignored() const {
  const std::int64_t rows = row_count(call_.p);
  if (count() == rows) return;
  const RowOutputs out = wanted_outputs();
  for (std::int64_t n = 0; n < rows; ++n) {
    if (target(n) != call_.p.rows.ignore_index) continue;
    clear_row(out, n, T(0));
  }
}

template <class T>
std::int64_t ListedRows<T>::target(std::int64_t n) const {
  return target_at(call_.args.in.targets, call_.p.rows.target_type, map_.target(n));
}

template <class T>
std::int64_t ListedRows<T>::e_offset(std::int64_t n) const {
  return map_.sequence(n) * call_.head.e_sequence_stride + map_.column(n) * call_.head.e_row_stride;
}

template <class T>
T ListedRows<T>::inv_temperature(std::int64_t n) const {
  const Problem& p = call_.p;
  const double own =
      p.rows.has_temperature ? static_cast<const T*>(call_.args.in.temperature)[n] : 1.0;
  return static_cast<T>(1.0 / (own * p.transform.temperature));
}

template class ListedRows<float>;
template class ListedRows<double>;

}  // namespace cutloss::cpu
