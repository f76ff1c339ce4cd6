// Makes the statistics of a chunk's rows, from logits that are made slab by slab and forgotten or
// kept.
#pragma once

#include "cpu/kept_logits.h"
#include "cpu/operands.h"

namespace cutloss::cpu {

template <class T>
class Statistics {
 public:
  Statistics(const Call& call, const ListedRows<T>& rows, Operands<T>& operands)
      : call_(call), rows_(rows), operands_(operands) {}

  // Makes those of a chunk that is not empty. Its logits are forgotten where `kept` is null, and
  // else kept there.
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
