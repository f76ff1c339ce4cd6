// What the sessions of the CPU's algorithms are made of, and the little that they share.
#pragma once

#include <memory>
#include <utility>

#include "cpu/gradient_rows.h"
#include "cpu/gradient_sums.h"
#include "cpu/kept_logits.h"
#include "cpu/statistics.h"
#include "loops/sweep.h"
#include "plan/algorithm.h"
#include "plan/sessions.h"

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

  // A chunk's entries of the list.
  RowRange chunk(std::int64_t index) const {
    return chunk_range(call.d.sizes, rows.count(), index);
  }

  // Gradients of a chunk, of the g that make_g(block) makes.
  template <class MakeG>
  void add_gradients(RowRange chunk, MakeG make_g) {
    const Sizes& sizes = call.d.sizes;
    const bool last_chunk = chunk.begin + chunk.count == rows.count();
    sweep(
        call.head.classes.count, sizes.gradient_slab, chunk, sizes.gradient_rows,
        [&](const Block& block) { sums.add(block, make_g(block)); },
        [&](Columns columns) {
          if (last_chunk) sums.store_columns(columns);
        });
    if (chunk.count > 0) sums.store_rows(chunk);
  }

  const Call call;
  ListedRows<T> rows;
  Operands<T> operands;
  KeptLogits<T> kept;
  Statistics<T> statistics;
  GradientRows<T> gradient;
  GradientSums<T> sums;
};

// What all of them do alike.
template <class T>
class CpuSession : public CheckedSession {
 public:
  CpuSession(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : CheckedSession(chunk_count(*decision), pass), parts(std::move(decision), args, pass) {}

 protected:
  void list_rows() override {
    parts.rows.list();
    if (makes_statistics(pass())) parts.rows.clear_ignored();
  }
  void finish_gradients() override { parts.sums.finish(); }
  RowList rows_of(std::int64_t chunk) override { return parts.rows.entries(parts.chunk(chunk)); }

  Components<T> parts;
};

// A session in the decision's stat dtype.
template <template <class> class SessionOf>
std::unique_ptr<CheckedSession> open_session(std::shared_ptr<const Decision> decision,
                                             const Args& args, Pass pass) {
  if (static_cast<const CpuDecision&>(*decision).stat == DType::f64) {
    return std::make_unique<SessionOf<double>>(std::move(decision), args, pass);
  }
  return std::make_unique<SessionOf<float>>(std::move(decision), args, pass);
}

// An algorithm by its name, its way and its session.
template <template <class> class SessionOf>
class CpuAlgorithm final : public Algorithm {
 public:
  CpuAlgorithm(std::string_view name, Way way) : name_(name), way_(way) {}

  std::string_view name() const override { return name_; }
  Way way() const override { return way_; }
  std::shared_ptr<const Decision> decide(const Problem& problem, std::int64_t budget,
                                         std::int64_t& least) const override {
    return cpu::decide(*this, way_, problem, budget, least);
  }
  std::unique_ptr<CheckedSession> open(std::shared_ptr<const Decision> decision, const Args& args,
                                       Pass pass) const override {
    return open_session<SessionOf>(std::move(decision), args, pass);
  }

 private:
  std::string_view name_;
  Way way_;
};

}  // namespace cutloss::cpu
