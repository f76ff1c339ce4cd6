#include "cuda/operands.h"

namespace cutloss::cuda {

void copy_flat(const void* from, DType from_type, void* to, DType to_type, std::int64_t count,
               cudaStream_t stream) {
  constexpr std::int64_t kColumns = 1024;  // a block's worth
  const std::int64_t rows = count / kColumns;
  RowCopy copy{from, from_type, kColumns, to, to_type, kColumns, rows, kColumns};
  copy_rows(copy, stream);
  const std::int64_t done = rows * kColumns;
  copy.from = at(from, from_type, done);
  copy.to = at(to, to_type, done);
  copy.rows = done < count ? 1 : 0;
  copy.columns = count - done;
  copy_rows(copy, stream);
}

template <class T>
void Operands<T>::begin() {
  const std::int64_t V = call_.head.classes.count;
  if (call_.d.converts_bias) {
    copy_flat(call_.args.in.bias, call_.head.bias_type, call_.buffer<T>(buffer::kBias),
              call_.d.stat, V, call_.stream);
  }
  if (call_.d.converts_c && call_.reads.c_columns >= V) convert_columns({0, V});
}

template <class T>
void Operands<T>::pack(RowRange rows, void* to, std::int64_t stride) const {
  const Head& head = call_.head;
  const RowCopy copy{call_.args.in.e, head.e_type, head.e_row_stride, to,
                     call_.d.operand, stride,      rows.count,        head.D};
  gather_rows(copy, rows_.places(rows.begin), call_.stream);
}

template <class T>
Matrix Operands<T>::e(RowRange rows, RowRange chunk) {
  const Head& head = call_.head;
  if (call_.reads.e_in_place) {
    // The rows of E follow each other, and those that predict nothing come at the end.
    return {at(call_.args.in.e, head.e_type, rows.begin * head.e_row_stride), head.e_row_stride};
  }
  const bool in_de = call_.reads.e_in_de && !left_de_;
  const std::int64_t stride = in_de ? head.D : e_stride(call_.p, call_.d.operand);
  void* packed = in_de      ? call_.args.gradients.de
                 : left_de_ ? call_.buffer<void>(buffer::kLastE)
                            : call_.buffer<void>(buffer::kE);
  const RowRange wanted = in_de || (call_.reads.whole_e && !left_de_) ? chunk : rows;
  if (packed_rows_ != wanted) {
    pack(wanted, packed, stride);
    packed_rows_ = wanted;
  }
  return {at(packed, call_.d.operand, (rows.begin - wanted.begin) * stride), stride};
}

template <class T>
void Operands<T>::leave_de() {
  if (!call_.reads.e_in_de) return;
  left_de_ = true;
  packed_rows_ = {-1, 0};
}

template <class T>
Matrix Operands<T>::packed_e(RowRange chunk) {
  void* packed = call_.buffer<void>(buffer::kE);
  const std::int64_t stride = e_stride(call_.p, call_.d.operand);
  if (packed_rows_ != chunk) {
    pack(chunk, packed, stride);
    packed_rows_ = chunk;
  }
  return {packed, stride};
}

template <class T>
std::int64_t Operands<T>::most_columns() const {
  return call_.d.converts_c ? call_.reads.c_columns : call_.head.classes.count;
}

template <class T>
void Operands<T>::convert_columns(Columns columns) const {
  const Head& head = call_.head;
  const RowCopy copy{at(call_.args.in.c, head.c_type, columns.begin * head.c_row_stride),
                     head.c_type,
                     head.c_row_stride,
                     call_.buffer<void>(buffer::kC),
                     call_.d.operand,
                     e_stride(call_.p, call_.d.operand),
                     columns.count,
                     head.D};
  copy_rows(copy, call_.stream);
}

template <class T>
Matrix Operands<T>::c(Columns columns) {
  const Head& head = call_.head;
  if (!call_.d.converts_c) {
    return {at(call_.args.in.c, head.c_type, columns.begin * head.c_row_stride), head.c_row_stride};
  }
  void* converted = call_.buffer<void>(buffer::kC);
  const std::int64_t stride = e_stride(call_.p, call_.d.operand);
  if (call_.reads.c_columns >= head.classes.count) {
    return {at(converted, call_.d.operand, columns.begin * stride), stride};
  }
  if (converted_columns_ != columns) {
    convert_columns(columns);
    converted_columns_ = columns;
  }
  return {converted, stride};
}

template <class T>
const T* Operands<T>::bias(std::int64_t column) const {
  if (!call_.head.has_bias) return nullptr;
  const T* all = call_.d.converts_bias ? call_.buffer<T>(buffer::kBias)
                                       : static_cast<const T*>(call_.args.in.bias);
  return all + column;
}

template <class T>
const T* Operands<T>::class_weight(std::int64_t column) const {
  return call_.p.has_class_weight
             ? static_cast<const T*>(call_.args.in.class_weight) + call_.head.classes.first + column
             : nullptr;
}

template class Operands<float>;
template class Operands<double>;

}  // namespace cutloss::cuda
