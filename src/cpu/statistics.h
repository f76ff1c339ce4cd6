// The statistics of a chunk's rows: its logits slab by slab, each forgotten or kept.
#pragma once

#include "cpu/kept_logits.h"
#include "cpu/operands.h"

namespace cutloss::cpu {

template <class T>
class Statistics {
 public:
  Statistics(const Call& call, const ListedRows<T>& rows, Operands<T>& operands)
      : call_(call), rows_(rows), operands_(operands) {}

  // Of a chunk, not an empty one, whose logits are forgotten, or go where `kept` says.
  void make(RowRange chunk, const KeptLogits<T>* kept);

 private:
  void add(const Block& block, const KeptLogits<T>* kept);
  void close(RowRange chunk);
  RowState<T>* states() const { return call_.buffer<RowState<T>>(buffer::kStates); }

  const Call& call_;
  const ListedRows<T>& rows_;
  Operands<T>& operands_;
};

extern template class Statistics<float>;
extern template class Statistics<double>;

}  // namespace cutloss::cpu
