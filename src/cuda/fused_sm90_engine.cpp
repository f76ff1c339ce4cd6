#include "cuda/fused_sm90_engine.h"

#include <algorithm>
#include <limits>

#include "core/dtype.h"
#include "core/sizes.h"
#include "core/text.h"
#include "cuda/device.h"
#include "cuda/library_engine.h"
#include "cuda/sm90/layout.h"
#include "cuda/sm90/parts.h"

namespace cutloss {
namespace {

using namespace cuda;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
constexpr std::int64_t kTileColumns = 192;
constexpr std::int64_t kBlockRows = 256;

// Beyond this a slab of gradients gains nothing: dE's sums are read and written once for each.
constexpr std::int64_t kMostSlab = 65536;
// Under this most of the device would wait.
constexpr std::int64_t kLeastSlab = 4 * kTileColumns;
// By rows: chunks of more rows gain little, dC's sums pass by once for each.
constexpr std::int64_t kGoodChunk = 2048;
constexpr std::int64_t kMostChunk = 4096;
// Under so many rows dC's sums take longer than a fourth product.
constexpr std::int64_t kLeastChunk = 1024;
// tanh is good to an absolute 2^-22, so a logit to 2^-22 of the softcap.
constexpr double kMostSoftcap = 256;
// cuBLASLt's workspace, as memory allows.
constexpr std::int64_t kLibraryBytes[] = {32 * kMiB, 4 * kMiB, 0};

// Bytes of a pass in its roomiest shape that fits `budget`, or in the least.
std::int64_t pass_bytes(const Plan& plan, const Traits& traits, Passes passes,
                        std::int64_t library_bytes, std::int64_t budget) {
  std::int64_t bytes = 0;
  for (const sm90::Shape& shape : sm90::shapes(plan, traits, passes)) {
    bytes = Layout(sm90::workspace_needs(plan, traits, passes, shape)).bytes() + library_bytes;
    if (bytes <= budget) break;
  }
  return bytes;
}

// Sets the bytes of a plan whose sizes are set.
void set_bytes(Plan& plan, const Traits& traits, std::int64_t library_bytes, std::int64_t budget) {
  plan.kept_bytes = Layout(sm90::kept_needs(plan)).bytes();
  const std::int64_t left = budget - plan.kept_bytes;
  const bool in_one_call = plan.schedule == Schedule::rows && !plan.keeps_logits;
  const Passes forward = laid_out(plan, {true, false});
  plan.forward_workspace_bytes =
      pass_bytes(plan, traits, forward, forward.backward ? library_bytes : 0, left);
  plan.backward_workspace_bytes =
      plan.schedule == Schedule::none || in_one_call
          ? 0
          : pass_bytes(plan, traits, {false, true}, library_bytes, left);
}

// Columns of a slab that need not be the whole vocabulary: C is converted a slab at a time.
std::int64_t forward_slab(const Problem& p, const Traits& traits, bool small) {
  if (head_of(p).c_type == traits.operand) return classes_of(p).count;
  return std::min(classes_of(p).count, small ? 8 * kTileColumns : 128 * kTileColumns);
}

class FusedSm90Engine final : public Engine {
 public:
  std::string_view name() const override { return "cuda/fused_sm90"; }

  std::string description() const override {
    if (const std::string refusal = cuda_refusal(); !refusal.empty()) return "not here: " + refusal;
    const DeviceFacts& device = current_device();
    if (device.sm != 90)
      return text("not here: ", device.name, " is sm_", device.sm, ", not sm_90");
    return text(device.name, ": TMA and WGMMA kernels; gradients' products as cuda/library");
  }

  std::string refusal(const Problem& p) const override {
    const Head& head = head_of(p);
    if (std::string refusal = common_refusal(p); !refusal.empty()) return refusal;
    const DeviceFacts& device = current_device();
    if (device.sm != 90) return text(device.name, " is sm_", device.sm, ", not sm_90 (Hopper)");
    const DType operand = product_type(p);
    if (operand != DType::bf16 && operand != DType::f16) {
      return text("products are in ", cutloss::name(operand), ", not bf16 or f16");
    }
    if (p.transform.softcap && *p.transform.softcap > kMostSoftcap) {
      return text("softcap = ", *p.transform.softcap, " is over ", kMostSoftcap,
                  ", where these kernels' tanh would cost the logits digits");
    }
    if (head.D % 8 != 0) return text("D = ", head.D, " is not a multiple of 8");
    const auto uneven = [&](DType type, std::int64_t stride) {
      return type == operand && stride % 8 != 0;
    };
    if (uneven(head.e_type, head.e_row_stride) || uneven(head.e_type, head.e_sequence_stride) ||
        uneven(head.c_type, head.c_row_stride)) {
      return text("rows of E are ", head.e_row_stride, " and of C ", head.c_row_stride,
                  " elements apart: not multiples of 8");
    }
    return "";
  }

  std::string schedule_refusal(const Problem& p, Schedule schedule) const override {
    return schedule == Schedule::rows ? sm90::rows_refusal(p) : "";
  }

  bool fit(Plan& plan, std::int64_t budget, std::int64_t& smallest) const override {
    smallest = std::numeric_limits<std::int64_t>::max();
    const Traits traits = traits_of(plan.problem);
    for (const std::int64_t library_bytes : kLibraryBytes) {
      if (fit_with(plan, traits, library_bytes, budget, smallest)) return true;
    }
    return false;
  }

  std::unique_ptr<Parts> bind(const Plan& plan, const Args& args, Passes passes) const override {
    const Traits traits = traits_of(plan.problem);
    const Passes all = laid_out(plan, passes);
    sm90::Shape shape;
    sm90::FusedParts::Memory memory;
    memory.workspace = sm90::workspace_layout(plan, traits, all, &shape);
    memory.kept = Layout(sm90::kept_needs(plan));
    memory.room = {true, shape.c_columns};
    return std::make_unique<sm90::FusedParts>(plan, args, all, std::move(memory), shape);
  }

 private:
  static bool fit_with(Plan& plan, const Traits& traits, std::int64_t library_bytes,
                       std::int64_t budget, std::int64_t& smallest) {
    const std::int64_t rows = std::max<std::int64_t>(row_count(plan.problem), 1);
    const std::int64_t V = classes_of(plan.problem).count;
    const auto accept = [&](Plan& trial) {
      set_bytes(trial, traits, library_bytes, budget);
      smallest = std::min(smallest, peak_bytes(trial));
      return peak_bytes(trial) <= budget;
    };
    Plan trial = plan;
    if (plan.schedule == Schedule::rows) {
      trial.slab = trial.gradient_slab = V;
      Plan best;
      bool found = false;
      for (const std::int64_t chunk : chunks(plan, rows)) {
        trial.chunk_rows = trial.block_rows = trial.gradient_rows = chunk;
        if (!accept(trial)) continue;
        // The whole in one chunk, or chunks of enough rows: the smaller of the two.
        if (!found || (chunk >= kGoodChunk && peak_bytes(trial) < peak_bytes(best))) best = trial;
        found = true;
        if (chunk < rows) break;
      }
      if (found) plan = best;
      return found;
    }
    trial.chunk_rows = trial.block_rows = trial.gradient_rows = rows;
    for (const bool small : {false, true}) {
      trial.slab = forward_slab(plan.problem, traits, small);
      for (std::int64_t most = std::min(V, kMostSlab);; most = most * 7 / 8) {
        trial.gradient_slab = plan.schedule == Schedule::none
                                  ? trial.slab
                                  : even_piece(V, std::max(most, kLeastSlab), kTileColumns);
        if (accept(trial)) {
          plan = trial;
          return true;
        }
        if (most <= kLeastSlab || plan.schedule == Schedule::none) break;
      }
    }
    return false;
  }

  static std::vector<std::int64_t> chunks(const Plan& plan, std::int64_t rows) {
    std::vector<std::int64_t> sizes = {rows};
    if (plan.keeps_logits) return sizes;
    const bool asked_for =
        plan.problem.schedule == Schedule::rows || !plan.problem.wanted.dc.wanted;
    const std::int64_t least = asked_for ? kBlockRows : kLeastChunk;
    for (std::int64_t most = kMostChunk; most >= least; most -= kBlockRows) {
      const std::int64_t even = even_piece(rows, most, kBlockRows);
      if (even < sizes.back()) sizes.push_back(even);
    }
    return sizes;
  }
};

}  // namespace

const Engine& cuda_fused_sm90_engine() {
  static const FusedSm90Engine engine;
  return engine;
}

}  // namespace cutloss
