// What the sessions of cuda/library are made of, and what they share.
#pragma once

#include <memory>
#include <utility>

#include "cuda/gradient_sums.h"
#include "cuda/library/decision.h"
#include "cuda/row_coefficients.h"
#include "loops/sweep.h"
#include "plan/sessions.h"

namespace cutloss::cuda::library {

// T: the stat dtype.
template <class T>
struct Components {
  Components(const Components&) = delete;
  Components& operator=(const Components&) = delete;
  Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : call(std::move(decision), args, pass),
        rows(call),
        operands(call, rows),
        products(call),
        coefficients(call, rows, operands),
        sums(call, rows, operands, products) {}

  RowRange chunk(std::int64_t index) const {
    return chunk_range(call.d.sizes, rows.to_cover(), index);
  }

  // Statistics of a chunk whose logits are forgotten, or kept.
  void make_statistics(RowRange chunk, bool keep);
  // Its gradients, from what was kept of its logits or from logits that are made once more.
  void make_gradients(RowRange chunk, bool from_kept);

  const Call call;
  ListedRows<T> rows;
  Operands<T> operands;
  Products products;
  RowCoefficientsOf<T> coefficients;
  GradientSums<T> sums;

 private:
  void add_statistics(const Block& block, bool keep);
  BlockGradient from_kept_logits(const Block& block);
  BlockGradient from_product(const Block& block);
  BlockGradient place_of_g(const Block& block) const;
  GradientOf<T> gradient_of(const Block& block, const BlockGradient& g);
  LogitBlock<T> logit_block(T* z, std::int64_t stride, RowRange rows, Columns columns) const;
  Kept<T> kept(std::int64_t row_in_chunk, std::int64_t column) const;
};

extern template struct Components<float>;
extern template struct Components<double>;

template <class T>
class LibrarySession : public CheckedSession {
 public:
  LibrarySession(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : CheckedSession(chunk_count(*decision), pass), parts(std::move(decision), args, pass) {}

 protected:
  void list_rows() override {
    parts.rows.list();
    parts.operands.begin();
    if (makes_statistics(pass())) parts.rows.clear_ignored();
  }
  void finish_gradients() override { parts.sums.finish(); }
  RowList rows_of(std::int64_t chunk) override { return parts.rows.entries(parts.chunk(chunk)); }

  Components<T> parts;
};

// An algorithm by its name, its way and its session.
template <template <class> class SessionOf>
class LibraryAlgorithm final : public Algorithm {
 public:
  LibraryAlgorithm(std::string_view name, Way way) : name_(name), way_(way) {}

  std::string_view name() const override { return name_; }
  Way way() const override { return way_; }
  std::shared_ptr<const Decision> decide(const Problem& problem, std::int64_t budget,
                                         std::int64_t& least) const override {
    return library::decide(*this, way_, problem, budget, least);
  }
  std::unique_ptr<CheckedSession> open(std::shared_ptr<const Decision> decision, const Args& args,
                                       Pass pass) const override {
    const auto& d = static_cast<const CudaDecision&>(*decision);
    check_device(d);
    if (d.stat == DType::f64) {
      return std::make_unique<SessionOf<double>>(std::move(decision), args, pass);
    }
    return std::make_unique<SessionOf<float>>(std::move(decision), args, pass);
  }

 private:
  std::string_view name_;
  Way way_;
};

// A file each.
const Algorithm& forward_algorithm();
const Algorithm& by_rows();
const Algorithm& stored();
const Algorithm& by_vocabulary();

}  // namespace cutloss::cuda::library
