// The components that the sessions of the CPU's algorithms are made of.
#pragma once

#include <memory>
#include <utility>

#include "cpu/gradient_rows.h"
#include "cpu/gradient_sums.h"
#include "cpu/kept_logits.h"
#include "cpu/statistics.h"
#include "loops/sweep.h"

namespace cutloss::cpu {

// T is the stat dtype.
template <class T>
struct Components {
  Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : call(std::move(decision), args, pass),
        rows(call),
        operands(call, rows),
        kept(call),
        statistics(call, rows, operands),
        gradient(call, rows, operands),
        sums(call, rows, operands) {}

  void begin() { rows.list(); }

  void make_statistics(RowRange chunk, bool keep) {
    statistics.make(chunk, keep ? &kept : nullptr);
  }
  void make_gradients(RowRange chunk, bool from_kept) {
    sweep_gradients(
        *this, chunk,
        [&](const Block& block, Which which) {
          sums.add(block,
                   from_kept ? gradient.from_kept(block, kept) : gradient.from_product(block),
                   which);
        },
        [] {});
  }

  const Call call;
  ListedRows<T> rows;
  Operands<T> operands;
  KeptLogits<T> kept;
  Statistics<T> statistics;
  GradientRows<T> gradient;
  GradientSums<T> sums;
};

}  // namespace cutloss::cpu
