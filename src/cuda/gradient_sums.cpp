#include "cuda/gradient_sums.h"

#include <algorithm>

#include "cuda/device.h"

namespace cutloss::cuda {
namespace {

bool dc_has_sums_of(const CudaDecision& d, bool in_last_columns) {
  const bool one = in_last_columns ? d.one_product_makes_last_dc : d.one_product_makes_dc;
  return d.problem.wanted.dc.wanted && !d.dc_in_place && !one;
}

}  // namespace

void book_sums(Ledger& ledger, const CudaDecision& d, bool always_de_sums) {
  cutloss::book_sums(ledger, d, always_de_sums || !d.de_in_place, dc_has_sums_of(d, false));
}

template <class T>
void GradientSums<T>::add_dbias(const Block& block, const BlockGradient& g) const {
  column_sums({.g = g.data,
               .stride = g.stride,
               .type = call_.d.operand,
               .rows = block.rows.count,
               .columns = block.columns.count,
               .sums = call_.buffer<double>(buffer::kDbiasSums) + block.columns.begin,
               .accumulate = block.rows.begin > 0,
               .scalars = g.scalars},
              call_.stream);
}

template <class T>
void GradientSums<T>::add_de(const Block& block, const BlockGradient& g) {
  const std::int64_t D = call_.head.D, most = operands_.most_columns();
  const std::int64_t end = block.columns.begin + block.columns.count;
  for (std::int64_t v = block.columns.begin; v < end; v += most) {
    const Columns columns{v, std::min(most, end - v)};
    products_.multiply(
        {.M = block.rows.count,
         .N = D,
         .K = columns.count,
         .a = {at(g.data, call_.d.operand, v - block.columns.begin), g.stride, false},
         .b = {operands_.c(columns), false},
         .c = call_.de_sums<T>(block.chunk) + (block.rows.begin - block.chunk.begin) * D,
         .c_stride = D,
         .c_type = call_.d.stat,
         .alpha = call_.p.transform.logit_scale,
         .device_alpha = g.scalars,
         .accumulate = v > 0});
  }
}

template <class T>
void GradientSums<T>::add_dc(const Block& block, const BlockGradient& g) {
  const std::int64_t D = call_.head.D;
  const bool whole =
      in_last_columns_ ? call_.d.one_product_makes_last_dc : call_.d.one_product_makes_dc;
  products_.multiply({.M = block.columns.count,
                      .N = D,
                      .K = block.rows.count,
                      .a = {g.data, g.stride, true},
                      .b = {operands_.e(block.rows, block.chunk), false},
                      .c = whole ? call_.dc(block.columns.begin) : dc_sums(block.columns),
                      .c_stride = D,
                      .c_type = whole ? call_.d.dc_type : call_.d.stat,
                      .alpha = call_.p.transform.logit_scale,
                      .device_alpha = g.scalars,
                      .accumulate = adds_to_dc(block)});
}

template <class T>
void GradientSums<T>::store_columns(Columns columns) const {
  if (!dc_has_sums()) return;
  copy_flat(dc_sums(columns), call_.d.stat, call_.dc(columns.begin), call_.d.dc_type,
            columns.count * call_.head.D, call_.stream);
}

template <class T>
void GradientSums<T>::store_rows(RowRange chunk) const {
  const Head& head = call_.head;
  if (!call_.p.wanted.de.wanted || call_.d.de_in_place) return;
  const RowCopy copy{call_.de_sums<T>(chunk), call_.d.stat, head.D,      call_.args.gradients.de,
                     call_.d.de_type,         head.D,       chunk.count, head.D};
  scatter_rows(copy, rows_.places(chunk.begin), call_.stream);
}

template <class T>
void GradientSums<T>::finish() const {
  const Head& head = call_.head;
  const Wanted& wanted = call_.p.wanted;
  const Gradients& out = call_.args.gradients;
  const std::int64_t V = head.classes.count;
  const std::int64_t positions = call_.p.rows.sequences * call_.p.rows.length;
  const bool none = rows_.to_cover() == 0;
  const auto zeros = [&](void* to, std::int64_t bytes, const char* action) {
    check(cudaMemsetAsync(to, 0, static_cast<std::size_t>(bytes), call_.stream), action);
  };
  if (wanted.de.wanted && positions > 0) {
    clear_unpredicted(rows_.facts(), positions, out.de, call_.d.de_type, head.D, call_.stream);
  }
  if (wanted.dc.wanted && none && !wanted.dc.add) {
    zeros(out.dc, V * head.D * size_of(call_.d.dc_type), "zeros for dC");
  }
  if (wanted.dbias.wanted) {
    double* sums = call_.buffer<double>(buffer::kDbiasSums);
    if (none) zeros(sums, V * 8, "zeros for dbias");
    if (wanted.dbias.add) add_flat(out.dbias, call_.d.dbias_type, sums, V, call_.stream);
    copy_flat(sums, DType::f64, out.dbias, call_.d.dbias_type, V, call_.stream);
  }
  if (!call_.p.rows.num_valid || row_count(call_.p) == 0) return;
  const auto poison = [&](const GradientWanted& gradient, void* values, DType type,
                          std::int64_t count) {
    if (gradient.wanted) poison_where_wrong(rows_.table(), values, type, count, call_.stream);
  };
  poison(wanted.de, out.de, call_.d.de_type, positions * head.D);
  poison(wanted.dc, out.dc, call_.d.dc_type, V * head.D);
  poison(wanted.dbias, out.dbias, call_.d.dbias_type, V);
}

template <class T>
bool GradientSums<T>::dc_has_sums() const {
  return dc_has_sums_of(call_.d, in_last_columns_);
}

template <class T>
T* GradientSums<T>::dc_sums(Columns columns) const {
  if (!dc_has_sums()) return static_cast<T*>(call_.dc(columns.begin));
  if (in_last_columns_ && call_.d.packs_last_e) return call_.buffer<T>(buffer::kLastDcSums);
  return call_.dc_sums<T>(columns);
}

template class GradientSums<float>;
template class GradientSums<double>;

}  // namespace cutloss::cuda
