// What backward needs of each row of a chunk, made of its statistics and upstream gradients.
#pragma once

#include "cuda/operands.h"

namespace cutloss::cuda {

template <class T>
class RowCoefficientsOf {
 public:
  RowCoefficientsOf(const Call& call, const ListedRows<T>& rows, const Operands<T>& operands)
      : call_(call), rows_(rows), operands_(operands) {}

  // Of an entry of the chunk and those behind it. Made once for a chunk.
  const RowGradient<T>* of(RowRange chunk, std::int64_t entry);
  // The scale of g and its inverse, in device memory; null where g has none (but for fp16).
  DeviceScalars* scalars() const {
    return call_.d.operand == DType::f16 ? call_.buffer<DeviceScalars>(buffer::kScalars) : nullptr;
  }

 private:
  const Call& call_;
  const ListedRows<T>& rows_;
  const Operands<T>& operands_;
  RowRange made_of_{-1, 0};
};

extern template class RowCoefficientsOf<float>;
extern template class RowCoefficientsOf<double>;

}  // namespace cutloss::cuda
