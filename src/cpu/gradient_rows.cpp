#include "cpu/gradient_rows.h"

#include "core/loss_terms.h"

namespace cutloss::cpu {

template <class T>
const void* GradientRows<T>::from_kept(const Block& block, const KeptLogits<T>& kept) {
  void* g = call_.buffer<void>(buffer::kG);
  // With a softcap products are kept, so the transform is applied here.
  const bool transforms = call_.p.transform.softcap.has_value() && !call_.d.keeps_exponentials;
  if (transforms) operands_.bias(block.columns);  // it must be converted before threads ask for it
#pragma omp parallel for schedule(static)
  for (std::int64_t r = 0; r < block.rows.count; ++r) {
    const std::int64_t n = rows_.row(block.rows.begin + r);
    const GradientRow<T> of_row = row(n, block.columns);
    const std::int64_t in_chunk = block.rows.begin - block.chunk.begin + r;
    void* place = kept.row(in_chunk, block.columns);
    void* to = at(g, call_.d.operand, r * block.columns.count);
    if (call_.d.keeps_exponentials) {
      row_ops<T>().gradient_from_exponentials(of_row, place, kept.slab_max(in_chunk, block.columns),
                                              call_.d.operand, to);
    } else {
      const RowTransform<T> transform = operands_.transform(n, block.columns);
      row_ops<T>().gradient(of_row, static_cast<T*>(place), transforms ? &transform : nullptr,
                            call_.d.operand, to);
    }
  }
  return g;
}

template <class T>
const void* GradientRows<T>::from_product(const Block& block) {
  T* z = call_.buffer<T>(buffer::kZ);
  operands_.multiply_logits(block, z);
  void* g = call_.buffer<void>(buffer::kG);
#pragma omp parallel for schedule(static)
  for (std::int64_t r = 0; r < block.rows.count; ++r) {
    const std::int64_t n = rows_.row(block.rows.begin + r);
    const RowTransform<T> transform = operands_.transform(n, block.columns);
    row_ops<T>().gradient(row(n, block.columns), z + r * block.columns.count, &transform,
                          call_.d.operand, at(g, call_.d.operand, r * block.columns.count));
  }
  return g;
}

template <class T>
GradientRow<T> GradientRows<T>::row(std::int64_t n, Columns columns) const {
  const RowOutputs& rows = call_.args.rows;
  const auto read = [n](const void* array) {
    return array == nullptr ? T(0) : static_cast<const T*>(array)[n];
  };
  const T nll = read(rows.nll), row_max = read(rows.row_max), log_sum = read(rows.log_sum);
  const RowUpstream<T> up = row_upstream<T>(call_.args.upstream, n, row_max + log_sum);
  GradientRow<T> out{};
  out.columns = columns.count;
  out.class_weight = operands_.class_weight(columns);
  RowCoefficients<T>& k = out.coefficients;
  k = row_coefficients(up, nll, row_max, log_sum, call_.head.classes.total);
  k.entropy = k.d_entropy != T(0) ? read(rows.entropy) : T(0);
  k.softcap = static_cast<T>(call_.p.transform.softcap.value_or(0));
  k.inv_temperature = rows_.inv_temperature(n);
  const std::int64_t target = rows_.column(n) - columns.begin;
  out.target = target >= 0 && target < columns.count ? target : -1;
  if (out.target >= 0) {
    const T weight = out.class_weight == nullptr ? T(1) : out.class_weight[out.target];
    out.target_g = target_gradient(k, nll, up.d_nll, up.d_lse, weight);
  }
  return out;
}

template class GradientRows<float>;
template class GradientRows<double>;

}  // namespace cutloss::cpu
