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
  const Problem& p = d.problem;
  const Head& head = head_of(p);
  const std::int64_t stat = size_of(d.stat), V = head.classes.count;
  if (d.has_de_sums_in_dc()) {
    ledger.share(buffer::kDeSums, d.sizes.chunk_rows * head.D * stat, "dC",
                 "its last rows are made");
  } else if (p.wanted.de.wanted && (always_de_sums || !d.de_in_place)) {
    ledger.book(buffer::kDeSums, d.sizes.chunk_rows * head.D * stat);
  }
  if (dc_has_sums_of(d, false)) {
    ledger.book(buffer::kDcSums, (d.one_chunk ? d.sizes.gradient_slab : V) * head.D * stat,
                d.one_chunk ? Lifetime::step : Lifetime::call);
  }
  if (p.wanted.dbias.wanted) ledger.book(buffer::kDbiasSums, V * 8, Lifetime::call);
}

template <class T>
void GradientSums<T>::add_dbias(const Block& block, const BlockGradient& g) const {
  ColumnSums what;
  what.g = g.data;
  what.stride = g.stride;
  what.type = call_.d.operand;
  what.rows = block.rows.count;
  what.columns = block.columns.count;
  what.sums = call_.buffer<double>(buffer::kDbiasSums) + block.columns.begin;
  what.accumulate = block.rows.begin > 0;
  what.scalars = g.scalars;
  column_sums(what, call_.stream);
}

template <class T>
void GradientSums<T>::add_de(const Block& block, const BlockGradient& g) {
  const std::int64_t D = call_.head.D, most = operands_.most_columns();
  const std::int64_t end = block.columns.begin + block.columns.count;
  for (std::int64_t v = block.columns.begin; v < end; v += most) {
    const Columns columns{v, std::min(most, end - v)};
    const Matrix c = operands_.c(columns);
    Product product{};
    product.M = block.rows.count;
    product.N = D;
    product.K = columns.count;
    product.a = {at(g.data, call_.d.operand, v - block.columns.begin), g.stride, false};
    product.b = {c.data, c.stride, false};
    product.c = de_sums(block.chunk) + (block.rows.begin - block.chunk.begin) * D;
    product.c_stride = D;
    product.c_type = call_.d.stat;
    product.accumulate = v > 0;
    product.alpha = call_.p.transform.logit_scale;
    product.device_alpha = g.scalars;
    products_.multiply(product);
  }
}

template <class T>
void GradientSums<T>::add_dc(const Block& block, const BlockGradient& g) {
  const Head& head = call_.head;
  const Matrix e = operands_.e(block.rows, block.chunk);
  const bool whole =
      in_last_columns_ ? call_.d.one_product_makes_last_dc : call_.d.one_product_makes_dc;
  Product product{};
  product.M = block.columns.count;
  product.N = head.D;
  product.K = block.rows.count;
  product.a = {g.data, g.stride, true};
  product.b = {e.data, e.stride, false};
  product.c = whole ? at(call_.args.gradients.dc, call_.d.dc_type, block.columns.begin * head.D)
                    : dc_sums(block.columns);
  product.c_stride = head.D;
  product.c_type = whole ? call_.d.dc_type : call_.d.stat;
  product.accumulate = adds_to_dc(block);
  product.alpha = call_.p.transform.logit_scale;
  product.device_alpha = g.scalars;
  products_.multiply(product);
}

template <class T>
void GradientSums<T>::store_columns(Columns columns) const {
  const Head& head = call_.head;
  if (!dc_has_sums()) return;
  copy_flat(dc_sums(columns), call_.d.stat,
            at(call_.args.gradients.dc, call_.d.dc_type, columns.begin * head.D), call_.d.dc_type,
            columns.count * head.D, call_.stream);
}

template <class T>
void GradientSums<T>::store_rows(RowRange chunk) const {
  const Head& head = call_.head;
  if (!call_.p.wanted.de.wanted || call_.d.de_in_place) return;
  const RowCopy copy{de_sums(chunk),  call_.d.stat, head.D,      call_.args.gradients.de,
                     call_.d.de_type, head.D,       chunk.count, head.D};
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
  const auto zeros = [&](void* to, std::int64_t bytes, const char* what) {
    check(cudaMemsetAsync(to, 0, static_cast<std::size_t>(bytes), call_.stream), what);
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
T* GradientSums<T>::de_sums(RowRange chunk) const {
  if (call_.d.de_in_place) {
    return static_cast<T*>(call_.args.gradients.de) + chunk.begin * call_.head.D;
  }
  if (call_.d.has_de_sums_in_dc()) {
    return static_cast<T*>(sums_in_dc(call_.d, call_.args.gradients.dc));
  }
  return call_.buffer<T>(buffer::kDeSums);
}

template <class T>
bool GradientSums<T>::dc_has_sums() const {
  return dc_has_sums_of(call_.d, in_last_columns_);
}

template <class T>
T* GradientSums<T>::dc_sums(Columns columns) const {
  const std::int64_t first = columns.begin * call_.head.D;
  if (!dc_has_sums()) return static_cast<T*>(call_.args.gradients.dc) + first;
  if (in_last_columns_ && call_.d.packs_last_e) {
    return call_.buffer<T>(buffer::kLastDcSums);
  }
  return call_.buffer<T>(buffer::kDcSums) + (call_.d.one_chunk ? 0 : first);
}

template class GradientSums<float>;
template class GradientSums<double>;

}  // namespace cutloss::cuda
