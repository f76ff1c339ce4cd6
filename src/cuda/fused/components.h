// The components that the fused sessions are made of, and how their kernels are told of rows and
// columns.
#pragma once

#include <memory>
#include <utility>

#include "cuda/fused/decision.h"
#include "cuda/fused/rows.h"
#include "cuda/gradient_sums.h"
#include "cuda/rows/chunk_coefficients.h"
#include "loops/sweep.h"
#include "plan/sessions.h"

namespace cutloss::cuda::fused {

struct Components {
  // Throws Error(invalid_value) for pointers that the copy engine cannot read from.
  Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass);

  void begin();
  Listed listed(RowRange range) const;
  // Describes the logits of some entries of the list and some columns. `e` has rows of this list,
  // or is all of E where kernels find rows by position.
  Logits logits(RowRange range, Columns columns, const Matrix& e, bool by_position);
  const float* inv_temperature(std::int64_t entry) const;
  // E of a block, packed; or all of E, where kernels find its rows by their positions.
  Matrix e(const Block& block) {
    return finds_e ? Matrix{call.args.in.e, call.head.e_row_stride}
                   : operands.e(block.rows, block.chunk);
  }
  std::int64_t positions() const { return call.p.rows.sequences * call.p.rows.length; }

  const Call call;
  const FusedDecision& d;
  ListedRows<float> rows;
  Operands<float> operands;
  Products products;
  ChunkCoefficients<float> coefficients;
  GradientSums<float> sums;
  bool finds_e = false;
};

// Algorithm::open.
template <class Steps>
std::unique_ptr<CheckedSession> open_steps(std::shared_ptr<const Decision> decision,
                                           const Args& args, Pass pass) {
  return std::make_unique<StepsSession<Steps, Components>>(std::move(decision), args, pass);
}

}  // namespace cutloss::cuda::fused
