// What the sessions of the CPU's algorithms are made of, and the little that they share.
#pragma once

#include <memory>
#include <utility>

#include "cpu/gradient_rows.h"
#include "cpu/gradient_sums.h"
#include "cpu/kept_logits.h"
#include "cpu/statistics.h"
#include "loops/sweep.h"

namespace cutloss::cpu {

// T: the stat dtype.
template <class T>
struct Components {
  Components(const Components&) = delete;
  Components& operator=(const Components&) = delete;
  Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : call(std::move(decision), args, pass),
        rows(call),
        operands(call, rows),
        kept(call),
        statistics(call, rows, operands),
        gradient(call, rows, operands),
        sums(call, rows, operands) {}

  void begin() {
    rows.list();
    if (makes_statistics(call.pass)) rows.clear_ignored();
  }

  // Gradients of a chunk, of the g that make_g(block) makes.
  template <class MakeG>
  void add_gradients(RowRange chunk, MakeG make_g) {
    const bool last_chunk = chunk.begin + chunk.count == rows.count();
    sweep_gradients(
        call.d, chunk,
        [&](const Block& block, Which which) { sums.add(block, make_g(block), which); },
        [&](Columns columns) {
          if (last_chunk) sums.store_columns(columns);
        },
        [&] { sums.store_rows(chunk); }, [] {});
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
