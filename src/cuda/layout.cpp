#include "cuda/layout.h"

#include <algorithm>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/sizes.h"
#include "core/text.h"
#include "cuda/common/kernels.h"
#include "cuda/device.h"

namespace cutloss::cuda {
namespace {

constexpr std::int64_t kAlign = 256;  // a cache line and more; what cuBLASLt likes best

std::int64_t state_bytes(DType stat) {
  return stat == DType::f64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
}

std::int64_t piece_columns(DType stat) {
  return stat == DType::f64 ? kPieceColumns<double> : kPieceColumns<float>;
}

}  // namespace

Layout::Layout(const std::vector<Need>& needs) {
  placed_.reserve(needs.size());
  for (const Need& need : needs) {
    placed_.push_back({need.name, bytes_, need.bytes});
    bytes_ += round_up(need.bytes, kAlign);
  }
}

const Layout::Placed* Layout::find(std::string_view name) const {
  const auto found =
      std::find_if(placed_.begin(), placed_.end(), [&](const Placed& p) { return p.name == name; });
  return found == placed_.end() ? nullptr : &*found;
}

std::int64_t Layout::offset(std::string_view name) const {
  const Placed* placed = find(name);
  if (placed == nullptr) {
    throw Error(ErrorCode::internal, text("the workspace has no buffer '", name, "'"));
  }
  return placed->offset;
}

std::int64_t Layout::bytes_of(std::string_view name) const {
  const Placed* placed = find(name);
  return placed == nullptr ? 0 : placed->bytes;
}

DType product_type(const Problem& p) {
  const Head& head = head_of(p);
  switch (p.compute_type) {
    case DType::f64:
      return DType::f64;
    case DType::bf16:  // tensor cores of sm_75 know fp16 only
      return current_device().sm >= 80 ? DType::bf16 : DType::f32;
    case DType::f16:  // f32 holds every f16; the reverse would lose range
      return head.e_type == DType::f16 && head.c_type == DType::f16 ? DType::f16 : DType::f32;
    case DType::f32:
      break;
  }
  return DType::f32;
}

Traits traits_of(const Problem& p) {
  const Head& head = head_of(p);
  Traits t{};
  t.operand = product_type(p);
  t.stat = stat_type(p.compute_type);
  t.keeps_exponentials = !p.upstream.entropy && !(p.transform.softcap && p.upstream.zbar);
  t.kept = t.keeps_exponentials ? t.operand : t.stat;
  const bool one_run = p.rows.shift == 0 || p.rows.sequences == 1;
  t.identity = one_run && p.rows.num_valid == row_count(p);
  const bool even =
      p.rows.sequences == 1 ||
      (p.rows.shift == 0 && head.e_sequence_stride == p.rows.length * head.e_row_stride);
  t.evenly = even && head.e_type == t.operand;
  return t;
}

bool reads_e_in_place(const Plan& plan, const Traits& t, Passes passes) {
  if (!t.evenly) return false;
  const Problem& p = plan.problem;
  if (p.rows.num_valid == row_count(p)) return true;
  // Logits of rows that do not count are computed and left alone. Where backward multiplies by E
  // such rows must be zeros, and what is kept must lie where backward expects it.
  return !p.rows.num_valid && !passes.backward && plan.schedule != Schedule::rows;
}

bool packs_e_in_de(const Plan& plan, const Traits& t, Passes passes) {
  const Problem& p = plan.problem;
  return p.wanted.de.wanted && !passes.forward && !reads_e_in_place(plan, t, passes) &&
         !accumulates_de_in_place(plan, t) && size_of(head_of(p).e_type) == size_of(t.operand);
}

bool makes_g_in_place(const Plan& plan, const Traits& t) {
  return plan.schedule == Schedule::rows && !plan.keeps_logits && t.kept == t.operand;
}

bool accumulates_de_in_place(const Plan& plan, const Traits& t) {
  return t.identity && head_of(plan.problem).e_type == t.stat;
}

bool one_product_makes_dc(const Plan& plan, const Traits& t) {
  return head_of(plan.problem).c_type == t.operand && plan.gradient_rows >= row_count(plan.problem);
}

std::int64_t padded(std::int64_t columns, DType type) {
  return round_up(columns, 16 / size_of(type));
}

std::int64_t e_stride(const Problem& p, DType operand) { return padded(head_of(p).D, operand); }

std::int64_t pieces_per_slab(const Plan& plan) {
  const std::int64_t columns = piece_columns(stat_type(plan.problem.compute_type));
  return (plan.slab + columns - 1) / columns;
}

std::int64_t pieces(const Plan& plan) {
  return (classes_of(plan.problem).count + plan.slab - 1) / plan.slab * pieces_per_slab(plan);
}

std::vector<Room> rooms(const Plan& plan, const Traits& t) {
  const Problem& p = plan.problem;
  const std::int64_t least = std::min(plan.slab, classes_of(p).count);
  if (head_of(p).c_type == t.operand) return {{true, least}, {false, least}};
  const std::int64_t several = std::clamp<std::int64_t>(8192, least, classes_of(p).count);
  return {{true, classes_of(p).count}, {true, several}, {true, least}, {false, least}};
}

std::vector<Need> workspace_needs(const Plan& plan, const Traits& t, Passes passes, Room room) {
  const auto [forward, backward] = passes;
  const Problem& p = plan.problem;
  const Head& head = head_of(p);
  const std::int64_t N = row_count(p);
  const std::int64_t operand = size_of(t.operand);
  const std::int64_t stat = size_of(t.stat);
  const bool from_kept = plan.schedule == Schedule::rows;
  std::vector<Need> needs;
  needs.reserve(20);
  needs.push_back({use::kCounts, 2 * 4});
  needs.push_back({use::kRows, N * 8});
  needs.push_back({use::kPositions, N * 4});
  needs.push_back({use::kTargets, N * 4});
  needs.push_back({use::kInvTemperature, N * stat});
  if (forward) needs.push_back({use::kStates, plan.chunk_rows * state_bytes(t.stat)});
  if (head.has_bias && head.bias_type != t.stat) {
    needs.push_back({use::kBias, head.classes.count * stat});
  }
  if (!reads_e_in_place(plan, t, passes) && !packs_e_in_de(plan, t, passes)) {
    const std::int64_t block = std::max(plan.block_rows, backward ? plan.gradient_rows : 0);
    const std::int64_t rows = room.whole_e ? plan.chunk_rows : std::min(block, plan.chunk_rows);
    needs.push_back({use::kE, rows * e_stride(p, t.operand) * operand});
  }
  if (head.c_type != t.operand) {
    needs.push_back({use::kC, room.c_columns * e_stride(p, t.operand) * operand});
  }
  if (forward || !from_kept) {
    needs.push_back({use::kZ, plan.block_rows * padded(plan.slab, t.stat) * stat});
  }
  if (!backward) return needs;
  if (t.operand == DType::f16) needs.push_back({use::kScalars, sizeof(DeviceScalars)});
  needs.push_back({use::kCoefficients, plan.chunk_rows * 8 * stat});
  if (!makes_g_in_place(plan, t)) {
    needs.push_back(
        {use::kG, plan.gradient_rows * padded(plan.gradient_slab, t.operand) * operand});
  }
  if (p.wanted.de.wanted && !accumulates_de_in_place(plan, t)) {
    needs.push_back({use::kDeSums, plan.chunk_rows * head.D * stat});
  }
  if (p.wanted.dc.wanted && head.c_type != t.stat && !one_product_makes_dc(plan, t)) {
    const bool one_chunk = plan.chunk_rows >= N;
    needs.push_back(
        {use::kDcSums, (one_chunk ? plan.gradient_slab : head.classes.count) * head.D * stat});
  }
  if (p.wanted.dbias.wanted) needs.push_back({use::kDbiasSums, head.classes.count * 8});
  return needs;
}

std::vector<Need> kept_needs(const Plan& plan, const Traits& t) {
  if (plan.schedule != Schedule::rows) return {};
  std::vector<Need> needs;
  needs.push_back({use::kKept, plan.chunk_rows * padded(classes_of(plan.problem).count, t.kept) *
                                   size_of(t.kept)});
  if (t.keeps_exponentials) {
    needs.push_back({use::kMaxima, plan.chunk_rows * pieces(plan) * size_of(t.stat)});
  }
  return needs;
}

std::int64_t workspace_bytes(const Plan& plan, Passes passes) {
  return passes.forward ? plan.forward_workspace_bytes : plan.backward_workspace_bytes;
}

Passes laid_out(const Plan& plan, Passes passes) {
  return plan.schedule == Schedule::rows && !plan.keeps_logits ? Passes{true, true} : passes;
}

Layout workspace_layout(const Plan& plan, const Traits& t, Passes passes, Room* room) {
  for (const Room& r : rooms(plan, t)) {
    Layout layout(workspace_needs(plan, t, passes, r));
    if (layout.bytes() > workspace_bytes(plan, passes)) continue;
    *room = r;
    return layout;
  }
  throw Error(ErrorCode::internal,
              text("the plan's workspace of ", workspace_bytes(plan, passes),
                   " bytes is too small for its own sizes: was it made on another device?"));
}

}  // namespace cutloss::cuda
