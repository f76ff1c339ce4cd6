// What the fused sessions are made of, and how their kernels are told of rows and columns.
#pragma once

#include <memory>
#include <utility>

#include "cuda/fused/decision.h"
#include "cuda/gradient_sums.h"
#include "cuda/row_coefficients.h"
#include "cuda/sm90/rows.h"
#include "loops/sweep.h"
#include "plan/sessions.h"

namespace cutloss::cuda::fused {

inline sm90::Matrix kernel_matrix(const Matrix& m) { return {m.data, m.stride}; }

struct Components {
  Components(const Components&) = delete;
  Components& operator=(const Components&) = delete;
  // Throws Error(invalid_value) for pointers that the copy engine cannot read from.
  Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass);

  RowRange chunk(std::int64_t index) const { return chunk_range(d.sizes, rows.to_cover(), index); }
  sm90::Listed listed(RowRange range) const;
  // The product of some entries of the list and some columns. E is given: rows of this list, or, by
  // position, all of E.
  sm90::Logits logits(RowRange range, Columns columns, const Matrix& e, bool by_position);
  const float* inv_temperature(std::int64_t entry) const;

  const Call call;
  const FusedDecision& d;
  ListedRows<float> rows;
  Operands<float> operands;
  Products products;
  RowCoefficientsOf<float> coefficients;
  GradientSums<float> sums;
};

class FusedSession : public CheckedSession {
 public:
  FusedSession(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : CheckedSession(chunk_count(*decision), pass), parts(std::move(decision), args, pass) {}

 protected:
  void list_rows() override {
    parts.rows.list();
    parts.operands.begin();
    if (makes_statistics(pass())) parts.rows.clear_ignored();
  }
  void finish_gradients() override { parts.sums.finish(); }
  RowList rows_of(std::int64_t chunk) override { return parts.rows.entries(parts.chunk(chunk)); }

  Components parts;
};

// An algorithm by its name, its way and its session.
template <class SessionType>
class FusedAlgorithm final : public Algorithm {
 public:
  FusedAlgorithm(std::string_view name, Way way) : name_(name), way_(way) {}

  std::string_view name() const override { return name_; }
  Way way() const override { return way_; }
  std::string refusal(const Problem& problem) const override {
    return way_.schedule == Schedule::rows ? by_rows_refusal(problem) : "";
  }
  std::shared_ptr<const Decision> decide(const Problem& problem, std::int64_t budget,
                                         std::int64_t& least) const override {
    return fused::decide(*this, way_, problem, budget, least);
  }
  std::unique_ptr<CheckedSession> open(std::shared_ptr<const Decision> decision, const Args& args,
                                       Pass pass) const override {
    check_device(static_cast<const CudaDecision&>(*decision));
    return std::make_unique<SessionType>(std::move(decision), args, pass);
  }

 private:
  std::string_view name_;
  Way way_;
};

// A file each.
const Algorithm& forward_algorithm();
const Algorithm& exponentials();
const Algorithm& stored();
const Algorithm& by_vocabulary();

}  // namespace cutloss::cuda::fused
