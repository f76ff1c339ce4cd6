#include "cuda/sm90/layout.h"

#include <algorithm>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/text.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/sm90/targets.h"

namespace cutloss::sm90 {

using cuda::Need;
using cuda::Traits;

std::string rows_refusal(const Problem& p) {
  if (cuda::product_type(p) != DType::bf16) {
    return "kept exponentials need the range of bf16; the products' dtype is f16";
  }
  if (p.wants_entropy || p.wants_zbar || p.wants_argmax || p.entropy_gradient || p.zbar_gradient) {
    return "entropy, zbar and argmax need logits, but by rows exponentials are kept";
  }
  return "";
}

bool finds_e_by_position(const Problem& p, const Traits& traits) {
  return p.e_type == traits.operand &&
         (p.sequences == 1 || p.e_sequence_stride == p.length * p.e_row_stride);
}

Grid statistics_grid(const Plan& plan) {
  return grid_for(cuda::current_device().multiprocessors, static_cast<int>(plan.block_rows),
                  static_cast<int>(plan.slab), /*may_share_rows=*/true);
}

Grid logits_grid(std::int64_t rows) {
  return grid_for(cuda::current_device().multiprocessors, static_cast<int>(rows), 0, false);
}

std::vector<Need> workspace_needs(const Plan& plan, const Traits& t, Passes passes, Shape shape) {
  const auto [forward, backward] = passes;
  const Problem& p = plan.problem;
  const std::int64_t N = row_count(p);
  const std::int64_t operand = size_of(t.operand);
  const std::int64_t e_bytes = cuda::e_stride(p, t.operand) * operand;
  const bool by_rows = plan.schedule == Schedule::rows;
  namespace all = cuda::use;
  std::vector<Need> needs;
  needs.reserve(24);
  needs.push_back({all::kCounts, 2 * 4});
  needs.push_back({all::kRows, N * 8});
  needs.push_back({all::kPositions, N * 4});
  needs.push_back({all::kTargets, N * 4});
  needs.push_back({all::kInvTemperature, N * 4});
  if (p.has_bias && p.bias_type != DType::f32) needs.push_back({all::kBias, p.V * 4});
  if (p.c_type != t.operand) needs.push_back({all::kC, shape.c_columns * e_bytes});
  const bool packs_e = forward && !by_rows ? shape.packs_e_in_forward
                                           : !cuda::reads_e_in_place(plan, t, passes) &&
                                                 !cuda::packs_e_in_de(plan, t, passes);
  if (packs_e) needs.push_back({all::kE, plan.chunk_rows * e_bytes});

  if (forward && !by_rows) {
    const std::int64_t entries =
        partial_entries(statistics_grid(plan), static_cast<int>(plan.block_rows));
    needs.push_back({use::kPartials, entries * 8});
    if (p.wants_entropy || p.wants_zbar || p.wants_argmax) {
      needs.push_back({use::kPartialsMore, entries * 8});
      needs.push_back({use::kPartialsArgmax, entries * 8});
    }
    needs.push_back({use::kTargetLogit, plan.chunk_rows * 4});
    if (plan.slab < p.V) {
      needs.push_back({all::kStates, plan.chunk_rows * std::int64_t{sizeof(RowState<float>)}});
    }
  }
  const std::int64_t sums_bytes = plan.chunk_rows * column_tiles(p.V) * 8;
  const std::int64_t de_bytes = plan.chunk_rows * p.D * 4;
  if (forward && by_rows) {
    needs.push_back({use::kRedo, 4});
    if (!plan.keeps_logits) {
      needs.push_back({use::kTargetLogit, plan.chunk_rows * 4});
      needs.push_back({use::kReference, plan.chunk_rows * 4});
    }
    // The sums of a chunk are read before its dE begins.
    if (!backward || !p.needs_de || sums_bytes > de_bytes) {
      needs.push_back({use::kSums, sums_bytes});
    }
  }
  if (!backward) return needs;

  if (by_rows) {
    needs.push_back({use::kFactor, plan.chunk_rows * 4});
    needs.push_back({use::kTargetG, plan.chunk_rows * 4});
    if (p.needs_dc || p.needs_dbias) {
      needs.push_back({use::kTargetOrder, plan.chunk_rows * 4 * 4});
      needs.push_back({use::kTargetSort, target_sort_bytes(static_cast<int>(plan.chunk_rows),
                                                           static_cast<int>(p.V))});
    }
    if (p.needs_dc) {
      needs.push_back({use::kScaledE, plan.chunk_rows * e_bytes});
      needs.push_back({use::kSumOfColumn, p.V * 4});
      // Else they lie where dE's sums will be.
      if (!p.needs_de) needs.push_back({use::kTargetSums, de_bytes});
    }
  } else {
    if (t.operand == DType::f16) needs.push_back({all::kScalars, sizeof(cuda::DeviceScalars)});
    needs.push_back(
        {all::kCoefficients, plan.chunk_rows * std::int64_t{sizeof(cuda::RowGradient<float>)}});
    needs.push_back(
        {all::kG, plan.gradient_rows * cuda::padded(plan.gradient_slab, t.operand) * operand});
  }
  if (p.needs_de && (by_rows || !cuda::accumulates_de_in_place(plan, t))) {
    needs.push_back({all::kDeSums, de_bytes});
  }
  const bool whole = plan.chunk_rows >= N;
  const bool one_product = whole && p.c_type == t.operand;
  if (p.needs_dc && p.c_type != DType::f32 && !one_product) {
    needs.push_back({all::kDcSums, (whole ? plan.gradient_slab : p.V) * p.D * 4});
  }
  if (p.needs_dbias) needs.push_back({all::kDbiasSums, p.V * 8});
  return needs;
}

std::vector<Need> kept_needs(const Plan& plan) {
  if (plan.schedule != Schedule::rows) return {};
  std::vector<Need> needs;
  needs.push_back({use::kX, plan.chunk_rows * cuda::padded(plan.problem.V, DType::bf16) *
                                size_of(DType::bf16)});
  if (plan.keeps_logits) {
    needs.push_back({use::kTargetLogit, plan.chunk_rows * 4});
    needs.push_back({use::kReference, plan.chunk_rows * 4});
  }
  return needs;
}

std::vector<Shape> shapes(const Plan& plan, const Traits& t, Passes passes) {
  const Problem& p = plan.problem;
  const bool by_rows = plan.schedule == Schedule::rows;
  const bool statistics = passes.forward && !by_rows;
  // Packed rows are read a little quicker than gathered ones. With no gradient wanted, memory
  // counts more.
  std::vector<bool> packing = {false};
  if (statistics && !finds_e_by_position(p, t)) {
    packing = {true};
  } else if (statistics && plan.schedule != Schedule::none) {
    packing = {true, false};
  }
  std::vector<std::int64_t> columns = {p.V};
  if (p.c_type != t.operand && !by_rows) {
    for (const std::int64_t some : {std::int64_t{32768}, std::int64_t{8192}, plan.slab}) {
      if (some < columns.back() && some >= std::min(plan.slab, p.V)) columns.push_back(some);
    }
  }
  std::vector<Shape> list;
  for (const bool packs : packing) {
    for (const std::int64_t c_columns : columns) list.push_back({c_columns, packs});
  }
  return list;
}

cuda::Layout workspace_layout(const Plan& plan, const Traits& t, Passes passes, Shape* shape) {
  for (const Shape& s : shapes(plan, t, passes)) {
    cuda::Layout layout(workspace_needs(plan, t, passes, s));
    if (layout.bytes() > cuda::workspace_bytes(plan, passes)) continue;
    *shape = s;
    return layout;
  }
  throw Error(ErrorCode::internal,
              text("the plan's workspace of ", cuda::workspace_bytes(plan, passes),
                   " bytes is too small for its own sizes: was it made on another device?"));
}

}  // namespace cutloss::sm90
