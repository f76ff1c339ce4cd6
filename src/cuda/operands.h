// E, C and the bias as products and kernels read them: where they lie, or packed and converted.
#pragma once

#include "cuda/rows/listed_rows.h"

namespace cutloss::cuda {

// Copies `count` values, converting them.
void copy_flat(const void* from, DType from_type, void* to, DType to_type, std::int64_t count,
               cudaStream_t stream);

// T is the stat dtype.
template <class T>
class Operands {
 public:
  Operands(const Call& call, const ListedRows<T>& rows) : call_(call), rows_(rows) {}

  // Converts what is converted once for the call: the bias, and C where there is room for all of
  // it.
  void begin();

  // E of some entries of a chunk, (rows, D). Valid until the next call for others.
  Matrix e(RowRange rows, RowRange chunk);
  // Notes that E of a chunk lies packed where its statistics left it, since its buffer is booked
  // from statistics to gradients.
  void e_is_packed(RowRange chunk) { packed_rows_ = chunk; }
  // Notes that dE is written, so that E does not lie in its memory any more.
  void leave_de();
  // E of every entry of a chunk, packed in the list's order.
  Matrix packed_e(RowRange chunk);

  // C of some columns, (columns, D), of which there may be most_columns() at a time.
  Matrix c(Columns columns);
  std::int64_t most_columns() const;

  // The bias and the class weights from a column on, or null.
  const T* bias(std::int64_t column) const;
  const T* class_weight(std::int64_t column) const;
  T softcap() const { return static_cast<T>(call_.p.transform.softcap.value_or(0)); }

 private:
  void convert_columns(Columns columns) const;
  void pack(RowRange rows, void* to, std::int64_t stride) const;

  const Call& call_;
  const ListedRows<T>& rows_;
  RowRange packed_rows_{-1, 0};
  bool left_de_ = false;
  Columns converted_columns_{-1, 0};
};

extern template class Operands<float>;
extern template class Operands<double>;

}  // namespace cutloss::cuda
