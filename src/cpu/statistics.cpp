#include "cpu/statistics.h"

#include <algorithm>
#include <cstring>

#include "loops/sweep.h"

namespace cutloss::cpu {

template <class T>
void Statistics<T>::make(RowRange chunk, const KeptLogits<T>* kept) {
  const Sizes& sizes = call_.d.sizes;
  std::fill_n(states(), chunk.count, RowState<T>{});
  sweep(
      Columns{0, call_.head.classes.count}, sizes.slab, chunk, sizes.block_rows,
      [&](const Block& block) { add(block, kept); }, [](Columns) {});
  close(chunk);
}

template <class T>
void Statistics<T>::add(const Block& block, const KeptLogits<T>* kept) {
  const CpuDecision& d = call_.d;
  const Columns columns = block.columns;
  T* z = call_.buffer<T>(buffer::kZ);
  RowState<T>* const of_chunk = states();
  operands_.multiply_logits(block, z);

  StatisticsRow<T> shared{};
  shared.columns = columns.count;
  shared.first_column = columns.begin;
  shared.entropy = call_.p.wanted.entropy;
  shared.argmax = call_.p.wanted.argmax;
  shared.zbar = call_.p.wanted.zbar;
  shared.class_weight = operands_.class_weight(columns);
  shared.exponentials_type = d.kept_type;
#pragma omp parallel for schedule(static)
  for (std::int64_t r = 0; r < block.rows.count; ++r) {
    const std::int64_t n = rows_.row(block.rows.begin + r);
    const std::int64_t in_chunk = block.rows.begin - block.chunk.begin + r;
    StatisticsRow<T> row = shared;
    row.z = z + r * columns.count;
    row.target = rows_.column(n);
    row.transform = operands_.transform(n, columns);
    void* place = kept == nullptr ? nullptr : kept->row(in_chunk, columns);
    const bool exponentials = kept != nullptr && d.keeps_exponentials;
    if (exponentials) row.exponentials = place;
    // With a softcap the products are kept as they are: its slope cannot be told from z.
    const auto keep_z = [&] {
      std::memcpy(place, row.z, static_cast<std::size_t>(columns.count) * sizeof(T));
    };
    const bool keeps_z = kept != nullptr && !exponentials;
    if (keeps_z && call_.p.transform.softcap) keep_z();
    row_ops<T>().statistics(row, of_chunk[in_chunk]);
    if (exponentials) kept->slab_max(in_chunk, columns) = row.slab_max;
    if (keeps_z && !call_.p.transform.softcap) keep_z();
  }
}

template <class T>
void Statistics<T>::close(RowRange chunk) {
  const RowOutputs out = rows_.wanted_outputs();
  for (std::int64_t r = 0; r < chunk.count; ++r) {
    const std::int64_t n = rows_.row(chunk.begin + r);
    const std::int64_t column = rows_.column(n);
    const T* weight = operands_.class_weight({column, 1});
    const bool is_here = column >= 0 && column < call_.head.classes.count;
    finish_row(out, n, states()[r], column, weight != nullptr && is_here ? *weight : T(1),
               call_.head.classes);
  }
}

template class Statistics<float>;
template class Statistics<double>;

}  // namespace cutloss::cpu
