// Makes what backward needs of each row of a chunk, from its statistics and upstream gradients.
#pragma once

#include "cuda/operands.h"

namespace cutloss::cuda {

template <class T>
class ChunkCoefficients {
 public:
  ChunkCoefficients(const Call& call, const ListedRows<T>& rows, const Operands<T>& operands)
      : call_(call), rows_(rows), operands_(operands) {}

  // The coefficients of an entry of the chunk, followed by those behind it. They are made once a
  // chunk.
  const RowGradient<T>* from(RowRange chunk, std::int64_t entry);
  // The scale of g and its inverse, in device memory; null where g has none. Only fp16 has one.
  DeviceScalars* scalars() const {
    return call_.d.operand == DType::f16 ? call_.buffer<DeviceScalars>(buffer::kScalars) : nullptr;
  }

 private:
  const Call& call_;
  const ListedRows<T>& rows_;
  const Operands<T>& operands_;
  RowRange chunk_made_{-1, 0};
};

extern template class ChunkCoefficients<float>;
extern template class ChunkCoefficients<double>;

}  // namespace cutloss::cuda
