#include "cpu/operands.h"

#include "cpu/gemm/gemm.h"
#include "cpu/rows/convert.h"

namespace cutloss::cpu {

template <class T>
Matrix Operands<T>::e(RowRange rows) {
  const Head& head = call_.head;
  const DType operand = call_.d.operand;
  const void* e = call_.args.in.e;
  const std::int64_t first = rows_.row(rows.begin);
  const std::int64_t last = rows_.row(rows.begin + rows.count - 1);
  const bool contiguous = last - first == rows.count - 1;
  const bool even = contiguous && rows_.e_offset(last) - rows_.e_offset(first) ==
                                      (rows.count - 1) * head.e_row_stride;
  if (even && head.e_type == operand) {
    return {at(e, head.e_type, rows_.e_offset(first)), head.e_row_stride};
  }
  void* packed = call_.buffer<void>(buffer::kE);
  if (e_rows_ != rows) {
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < rows.count; ++r) {
      convert(head.e_type, at(e, head.e_type, rows_.e_offset(rows_.row(rows.begin + r))), operand,
              at(packed, operand, r * head.D), head.D);
    }
    e_rows_ = rows;
  }
  return {packed, head.D};
}

template <class T>
Matrix Operands<T>::c(Columns columns) {
  const Head& head = call_.head;
  const DType operand = call_.d.operand;
  const void* first = at(call_.args.in.c, head.c_type, columns.begin * head.c_row_stride);
  if (!call_.d.converts_c) return {first, head.c_row_stride};
  void* packed = call_.buffer<void>(buffer::kC);
  if (c_columns_ != columns) {
#pragma omp parallel for schedule(static)
    for (std::int64_t v = 0; v < columns.count; ++v) {
      convert(head.c_type, at(first, head.c_type, v * head.c_row_stride), operand,
              at(packed, operand, v * head.D), head.D);
    }
    c_columns_ = columns;
  }
  return {packed, head.D};
}

template <class T>
const T* Operands<T>::bias(Columns columns) {
  if (!call_.head.has_bias) return nullptr;
  const void* given = call_.args.in.bias;
  if (!call_.d.converts_bias) return static_cast<const T*>(given) + columns.begin;
  T* converted = call_.buffer<T>(buffer::kBias);
  if (!has_bias_) {
    convert(call_.head.bias_type, given, call_.d.stat, converted, call_.head.classes.count);
    has_bias_ = true;
  }
  return converted + columns.begin;
}

template <class T>
RowTransform<T> Operands<T>::transform(std::int64_t n, Columns columns) {
  return {bias(columns), static_cast<T>(call_.p.transform.softcap.value_or(0)),
          rows_.inv_temperature(n)};
}

template <class T>
const T* Operands<T>::class_weight(Columns columns) const {
  return call_.p.has_class_weight ? static_cast<const T*>(call_.args.in.class_weight) +
                                        call_.head.classes.first + columns.begin
                                  : nullptr;
}

template <class T>
void Operands<T>::multiply_logits(const Block& block, T* z) {
  bias(block.columns);  // it must be converted before threads ask for it
  multiply({.M = block.rows.count,
            .N = block.columns.count,
            .K = call_.head.D,
            .a = {e(block.rows), false},
            .b = {c(block.columns), true},
            .c = z,
            .c_stride = block.columns.count,
            .type = call_.d.operand,
            .c_type = call_.d.stat,
            .alpha = call_.p.transform.logit_scale});
}

template class Operands<float>;
template class Operands<double>;

}  // namespace cutloss::cpu
