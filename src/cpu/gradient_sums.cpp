#include "cpu/gradient_sums.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/gemm/gemm.h"
#include "cpu/rows/convert.h"
#include "cpu/tuning.h"

namespace cutloss::cpu {

template <class T>
void GradientSums<T>::add(const Block& block, const void* g, Which which) {
  const Wanted& wanted = call_.p.wanted;
  if (wanted.dbias.wanted && which.dc) add_dbias(block, g);
  if (wanted.de.wanted && which.de) add_de(block, g);
  if (wanted.dc.wanted && which.dc) add_dc(block, g);
}

// Each thread takes columns, so that every sum runs over the rows in order. A few rows at a time
// are summed in the stat dtype, those sums in fp64: where all rows are alike, a long sum in fp32
// would lose digits that no product loses.
template <class T>
void GradientSums<T>::add_dbias(const Block& block, const void* g) {
  double* sums = call_.buffer<double>(buffer::kDbiasSums) + block.columns.begin;
  const std::int64_t columns = block.columns.count;
  const std::int64_t rows = block.rows.count;
  if (block.rows.begin == 0) std::fill_n(sums, columns, 0.0);
#pragma omp parallel for schedule(static)
  for (std::int64_t v = 0; v < columns; v += kStrip) {
    const std::int64_t count = std::min(kStrip, columns - v);
    std::array<T, kStrip> few;
    for (std::int64_t r = 0; r < rows; r += kFewRows) {
      std::fill_n(few.begin(), count, T(0));
      for (std::int64_t i = r; i < std::min(r + kFewRows, rows); ++i) {
        row_ops<T>().add(call_.d.operand, g, i * columns + v, few.data(), count);
      }
      for (std::int64_t j = 0; j < count; ++j) sums[v + j] += static_cast<double>(few[j]);
    }
  }
}

template <class T>
void GradientSums<T>::add_de(const Block& block, const void* g) {
  const std::int64_t D = call_.head.D;
  T* sums = call_.de_sums<T>(block.chunk) + (block.rows.begin - block.chunk.begin) * D;
  multiply({.M = block.rows.count,
            .N = D,
            .K = block.columns.count,
            .a = {g, block.columns.count, false},
            .b = {operands_.c(block.columns), false},
            .c = sums,
            .c_stride = D,
            .type = call_.d.operand,
            .c_type = call_.d.stat,
            .alpha = call_.p.transform.logit_scale,
            .accumulate = block.columns.begin > 0});
}

template <class T>
void GradientSums<T>::add_dc(const Block& block, const void* g) {
  const std::int64_t D = call_.head.D;
  const bool whole = one_product_makes_dc();
  multiply({.M = block.columns.count,
            .N = D,
            .K = block.rows.count,
            .a = {g, block.columns.count, true},
            .b = {operands_.e(block.rows), false},
            .c = whole ? call_.dc(block.columns.begin) : dc_sums(block.columns),
            .c_stride = D,
            .type = call_.d.operand,
            .c_type = whole ? call_.d.dc_type : call_.d.stat,
            .alpha = call_.p.transform.logit_scale,
            .accumulate = block.rows.begin > 0 || call_.p.wanted.dc.add});
}

template <class T>
void GradientSums<T>::store_columns(Columns columns) {
  const Head& head = call_.head;
  if (!call_.p.wanted.dc.wanted || call_.d.dc_in_place || one_product_makes_dc()) return;
  const T* sums = dc_sums(columns);
#pragma omp parallel for schedule(static)
  for (std::int64_t v = 0; v < columns.count; ++v) {
    convert(call_.d.stat, sums + v * head.D, call_.d.dc_type, call_.dc(columns.begin + v), head.D);
  }
}

template <class T>
void GradientSums<T>::store_rows(RowRange chunk) {
  const Head& head = call_.head;
  if (!call_.p.wanted.de.wanted || call_.d.de_in_place)
    return;  // finish moves the rows to their places
  const T* sums = call_.de_sums<T>(chunk);
#pragma omp parallel for schedule(static)
  for (std::int64_t r = 0; r < chunk.count; ++r) {
    const std::int64_t place = rows_.position(rows_.row(chunk.begin + r));
    convert(call_.d.stat, sums + r * head.D, call_.d.de_type,
            at(call_.args.gradients.de, call_.d.de_type, place * head.D), head.D);
  }
}

template <class T>
void GradientSums<T>::finish() {
  const Head& head = call_.head;
  const Wanted& wanted = call_.p.wanted;
  const bool none = rows_.count() == 0;
  if (wanted.de.wanted) {
    if (call_.d.de_in_place) spread_de();
    clear_unpredicted_de();
  }
  if (wanted.dc.wanted && none && !wanted.dc.add) {
    std::memset(call_.args.gradients.dc, 0,
                static_cast<std::size_t>(head.classes.count * head.D * size_of(call_.d.dc_type)));
  }
  if (wanted.dbias.wanted) store_dbias(none);
}

// Whether one block holds every row: its product is dC then, and rounds it itself.
template <class T>
bool GradientSums<T>::one_product_makes_dc() const {
  return call_.d.dc_type == call_.d.operand && rows_.count() <= call_.d.sizes.block_rows;
}

template <class T>
T* GradientSums<T>::dc_sums(Columns columns) const {
  if (call_.d.dc_in_place) return static_cast<T*>(call_.dc(columns.begin));
  return call_.dc_sums<T>(columns);
}

template <class T>
void GradientSums<T>::store_dbias(bool no_rows) const {
  const Head& head = call_.head;
  const double* sums = call_.buffer<double>(buffer::kDbiasSums);
  std::array<T, kStrip> piece;
  for (std::int64_t v = 0; v < head.classes.count; v += kStrip) {
    const std::int64_t count = std::min(kStrip, head.classes.count - v);
    void* to = at(call_.args.gradients.dbias, call_.d.dbias_type, v);
    for (std::int64_t j = 0; j < count; ++j) {
      const double was = call_.p.wanted.dbias.add ? static_cast<const T*>(to)[j] : 0.0;
      piece[j] = static_cast<T>(was + (no_rows ? 0.0 : sums[v + j]));
    }
    convert(call_.d.stat, piece.data(), call_.d.dbias_type, to, count);
  }
}

// Moves the rows of dE from the front of the output to their places, last first, so that none is
// overwritten before it has moved. Each thread takes columns.
template <class T>
void GradientSums<T>::spread_de() const {
  const std::int64_t count = rows_.count(), D = call_.head.D;
  if (count == 0 || rows_.position(rows_.row(count - 1)) == count - 1) return;
  T* de = static_cast<T*>(call_.args.gradients.de);
#pragma omp parallel for schedule(static)
  for (std::int64_t d = 0; d < D; d += kStrip) {
    const auto bytes = static_cast<std::size_t>(std::min(kStrip, D - d)) * sizeof(T);
    for (std::int64_t i = count - 1; i >= 0; --i) {
      const std::int64_t to = rows_.position(rows_.row(i));
      if (to != i) std::memcpy(de + to * D + d, de + i * D + d, bytes);
    }
  }
}

// Writes zeros to the rows of dE that predict nothing, or an ignored target.
template <class T>
void GradientSums<T>::clear_unpredicted_de() const {
  const std::int64_t positions = call_.p.rows.sequences * call_.p.rows.length;
  if (positions == 0) return;
  const std::int64_t row_bytes = call_.head.D * size_of(call_.d.de_type);
  auto* de = static_cast<std::byte*>(call_.args.gradients.de);
  const std::int64_t count = rows_.count();
  std::int64_t next = 0;  // the first place that was not looked at yet
  for (std::int64_t i = 0; i <= count; ++i) {
    const std::int64_t place = i < count ? rows_.position(rows_.row(i)) : positions;
    std::memset(de + next * row_bytes, 0, static_cast<std::size_t>((place - next) * row_bytes));
    next = place + 1;
  }
}

template class GradientSums<float>;
template class GradientSums<double>;

}  // namespace cutloss::cpu
