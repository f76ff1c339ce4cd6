#include "cuda/rows/listed_rows.h"

#include <algorithm>

namespace cutloss::cuda {
namespace {

RowTable table_of(const Call& call) {
  int* counts = call.buffer<int>(buffer::kCounts);
  return {counts,
          counts + 1,
          call.buffer<std::int64_t>(buffer::kRows),
          call.buffer<int>(buffer::kPositions),
          call.buffer<int>(buffer::kTargets),
          call.buffer<void>(buffer::kInvTemperature)};
}

}  // namespace

template <class T>
ListedRows<T>::ListedRows(const Call& call) : call_(call), table_(table_of(call)) {}

template <class T>
RowFacts ListedRows<T>::facts() const {
  RowFacts facts = row_facts(call_.p, call_.args.in.targets, call_.args.in.temperature);
  facts.compact = call_.reads.compact;
  return facts;
}

template <class T>
void ListedRows<T>::list() const {
  if (row_count(call_.p) > 0) list_rows<T>(facts(), table_, call_.stream);
}

template <class T>
void ListedRows<T>::clear_ignored() const {
  if (row_count(call_.p) == 0) return;
  cuda::clear_ignored<T>(facts(), table_, wanted_outputs(), call_.stream);
}

template <class T>
std::int64_t ListedRows<T>::to_cover() const {
  const std::int64_t rows = row_count(call_.p);
  const std::optional<std::int64_t>& known = call_.p.rows.num_valid;
  return known ? std::clamp<std::int64_t>(*known, 0, rows) : rows;
}

template <class T>
Places ListedRows<T>::places(std::int64_t first) const {
  return {table_, first, static_cast<int>(call_.p.rows.length), call_.head.e_sequence_stride,
          call_.head.e_row_stride};
}

template class ListedRows<float>;
template class ListedRows<double>;

}  // namespace cutloss::cuda
