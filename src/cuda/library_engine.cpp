#include "cuda/library_engine.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.h"
#include "core/sizes.h"
#include "core/text.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/layout.h"
#include "cuda/parts.h"
#include "cuda/row_facts.h"

namespace cutloss {
namespace {

using namespace cuda;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

// What a plan is tried with, the quickest first. A later step gives up a little speed for memory;
// there is none that would give up most of it.
struct Step {
  std::int64_t logit_bytes;    // of a block of logits in the stat dtype
  std::int64_t library_bytes;  // cuBLASLt's workspace
  std::int64_t block_rows;     // at most
  std::int64_t least_chunk;    // rows that a chunk must have, unless it has all
  std::int64_t least_slab;     // columns that a slab of gradients must have, unless it has all
  std::int64_t gradient_rows;  // of gradients by vocabulary, at most; 0: all
};
constexpr Step kSteps[] = {
    {128 * kMiB, 32 * kMiB, 8192, 1024, 2048, 0},
    {32 * kMiB, 32 * kMiB, 4096, 1024, 2048, 0},
    {16 * kMiB, 4 * kMiB, 4096, 512, 1024, 0},
    {16 * kMiB, 4 * kMiB, 4096, 512, 1024, 8192},
    {4 * kMiB, 4 * kMiB, 1024, 256, 512, 0},
    {4 * kMiB, 4 * kMiB, 1024, 256, 512, 4096},
    {kMiB, 0, 512, 128, 256, 0},
    {kMiB, 0, 512, 128, 256, 2048},
};

// A block of logits passes through L2 where it can. Only quick memory (HBM3) is better used by
// larger products, which leave fewer multiprocessors idle: measured on an H200.
constexpr std::int64_t kL2Block = 32 * kMiB;
constexpr double kQuickMemory = 3e12;

// Beyond this a slab of gradients gains nothing: dE's sums are read and written once for each.
constexpr std::int64_t kMostSlab = 65536;
// The most rows of a chunk, unless one chunk has all: dC's sums are read and written once for each.
constexpr std::int64_t kMostChunk = 4096;
constexpr std::int64_t kGoodChunk = 2048;
// Columns of g that are made at a time where g has a place of its own, in chunks.
constexpr std::int64_t kChunkSlab = 8192;

// Sizes of a block of logits.
void set_block(Plan& plan, const Step& step, DType stat) {
  const std::int64_t numbers = step.logit_bytes / size_of(stat);
  plan.block_rows = even_piece(plan.chunk_rows, step.block_rows, 128);
  const std::int64_t beside = numbers / round_up(plan.block_rows, 128);
  const std::int64_t unit = beside >= 1024 ? 1024 : 128;
  plan.slab = even_piece(classes_of(plan.problem).count,
                         std::max<std::int64_t>(beside / unit * unit, 128), unit);
}

void set_bytes(Plan& plan, const Traits& traits, Room room, std::int64_t library_bytes) {
  const auto bytes = [&](Passes passes) {
    return Layout(workspace_needs(plan, traits, passes, room)).bytes() + library_bytes;
  };
  plan.kept_bytes = Layout(kept_needs(plan, traits)).bytes();
  plan.forward_workspace_bytes = bytes(laid_out(plan, {true, false}));
  const bool in_one_call = plan.schedule == Schedule::rows && !plan.keeps_logits;
  plan.backward_workspace_bytes =
      plan.schedule == Schedule::none || in_one_call ? 0 : bytes({false, true});
}

// Chunks of rows, the most first.
std::vector<std::int64_t> chunks(std::int64_t rows, const Step& step) {
  std::vector<std::int64_t> sizes = {std::max<std::int64_t>(rows, 1)};
  const std::int64_t most = std::min(kMostChunk, round_up(rows, 128) - 128);
  std::int64_t last = rows;
  for (std::int64_t size = most; size >= step.least_chunk; size -= 128) {
    const std::int64_t even = even_piece(rows, size, 128);
    if (even < last) sizes.push_back(even);
    last = even;
  }
  return sizes;
}

// Slabs of gradients, the widest first. Each is made of whole slabs of logits.
std::vector<std::int64_t> slabs(const Plan& plan, const Step& step) {
  const std::int64_t V = classes_of(plan.problem).count;
  std::vector<std::int64_t> sizes;
  for (std::int64_t count = std::max<std::int64_t>(1, std::min(V, kMostSlab) / plan.slab);;
       count = std::max<std::int64_t>(1, count * 7 / 8)) {
    const std::int64_t even = even_piece(V, count * plan.slab, plan.slab);
    if (even >= std::min(step.least_slab, V) && (sizes.empty() || even < sizes.back())) {
      sizes.push_back(even);
    }
    if (count == 1) return sizes;
  }
}

// One step's search for sizes within a budget. Notes the least that was tried.
class Search {
 public:
  Search(const Traits& traits, const Step& step, std::int64_t budget, std::int64_t& smallest)
      : traits_(traits), step_(step), budget_(budget), smallest_(smallest) {}

  // Sets the plan's sizes; false where none fit.
  bool find(Plan& plan) const {
    plan.chunk_rows = std::max<std::int64_t>(row_count(plan.problem), 1);
    set_block(plan, step_, traits_.stat);
    const bool in_chunks = plan.schedule == Schedule::rows && !plan.keeps_logits;
    if (in_chunks && step_.gradient_rows != 0) return false;  // as the step before
    const std::size_t choices = rooms(plan, traits_).size();
    for (std::size_t room = 0; room < choices; ++room) {
      if (in_chunks ? find_chunk(plan, room) : find_slab(plan, room)) return true;
    }
    return false;
  }

 private:
  // Gradients are made with the forward, a chunk at a time.
  bool find_chunk(Plan& plan, std::size_t room) const {
    const std::int64_t rows = row_count(plan.problem);
    Plan best;
    bool found = false;
    for (const std::int64_t chunk : chunks(rows, step_)) {
      Plan trial = plan;
      trial.chunk_rows = trial.gradient_rows = chunk;
      set_block(trial, step_, traits_.stat);
      trial.gradient_slab = classes_of(trial.problem).count;
      if (!makes_g_in_place(trial, traits_)) set_chunk_slab(trial);
      if (!fits(trial, room)) continue;
      // The whole in one chunk, or chunks of enough rows: the smaller of the two.
      if (!found || (chunk >= kGoodChunk && peak_bytes(trial) < peak_bytes(best))) best = trial;
      found = true;
      if (chunk < rows) break;
    }
    if (found) plan = best;
    return found;
  }

  // g of a chunk has a place of its own: a few slabs of logits.
  void set_chunk_slab(Plan& plan) const {
    const std::int64_t numbers = step_.logit_bytes / size_of(traits_.stat) / plan.chunk_rows;
    const std::int64_t count = std::min(kChunkSlab, numbers) / plan.slab;
    plan.gradient_slab = even_piece(classes_of(plan.problem).count,
                                    std::max<std::int64_t>(count, 1) * plan.slab, plan.slab);
  }

  // Gradients of all rows, a slab of columns at a time, or none.
  bool find_slab(Plan& plan, std::size_t room) const {
    Plan trial = plan;
    if (plan.schedule == Schedule::none) {
      trial.gradient_rows = trial.block_rows;
      trial.gradient_slab = trial.slab;
      if (!fits(trial, room)) return false;
      plan = trial;
      return true;
    }
    trial.gradient_rows = step_.gradient_rows == 0
                              ? plan.chunk_rows
                              : even_piece(plan.chunk_rows, step_.gradient_rows, 128);
    for (const std::int64_t slab : slabs(trial, step_)) {
      trial.gradient_slab = slab;
      if (!fits(trial, room)) continue;
      plan = trial;
      return true;
    }
    return false;
  }

  // room: which of the plan's rooms.
  bool fits(Plan& trial, std::size_t room) const {
    set_bytes(trial, traits_, rooms(trial, traits_)[room], step_.library_bytes);
    smallest_ = std::min(smallest_, peak_bytes(trial));
    return peak_bytes(trial) <= budget_;
  }

  const Traits& traits_;
  const Step& step_;
  const std::int64_t budget_;
  std::int64_t& smallest_;
};

class LibraryEngine final : public Engine {
 public:
  std::string_view name() const override { return "cuda/library"; }

  std::string description() const override {
    if (const std::string refusal = cuda_refusal(); !refusal.empty()) return "not here: " + refusal;
    const DeviceFacts& device = current_device();
    return text(device.name, ", sm_", device.sm, ", ", device.multiprocessors, " multiprocessors, ",
                device.l2_bytes / kMiB, " MiB of L2; ", describe_cublaslt());
  }

  std::string refusal(const Problem& p) const override { return common_refusal(p); }

  bool fit(Plan& plan, std::int64_t budget, std::int64_t& smallest) const override {
    smallest = std::numeric_limits<std::int64_t>::max();
    const Traits traits = traits_of(plan.problem);
    const bool quick = current_device().memory_rate >= kQuickMemory;
    for (const Step& step : kSteps) {
      if (step.logit_bytes > kL2Block && !quick) continue;
      if (Search(traits, step, budget, smallest).find(plan)) return true;
    }
    return false;
  }

  std::unique_ptr<Parts> bind(const Plan& plan, const Args& args, Passes passes) const override {
    const Passes all = laid_out(plan, passes);
    return plan.problem.compute_type == DType::f64 ? bind_as<double>(plan, args, all)
                                                   : bind_as<float>(plan, args, all);
  }

 private:
  template <class T>
  static std::unique_ptr<Parts> bind_as(const Plan& plan, const Args& args, Passes passes) {
    const Traits traits = traits_of(plan.problem);
    typename CudaParts<T>::Memory memory;
    memory.workspace = workspace_layout(plan, traits, passes, &memory.room);
    memory.kept = Layout(kept_needs(plan, traits));
    return std::make_unique<CudaParts<T>>(plan, args, passes, std::move(memory));
  }
};

}  // namespace

std::string cuda::common_refusal(const Problem& p) {
  if (p.device != Device::cuda) return "the tensors are not in a CUDA device's memory";
  if (std::string refusal = cuda_refusal(); !refusal.empty()) return refusal;
  if (std::string refusal = index_refusal(p.device_index); !refusal.empty()) return refusal;
  const DeviceFacts& device = current_device();
  if (device.sm < 75) {
    return text(device.name, " is sm_", device.sm, ", but sm_75 (Turing) or later is needed");
  }
  const std::string too_large = size_refusal(p.rows, classes_of(p).count);
  if (!too_large.empty()) return too_large;
  return cublaslt_refusal();
}

const Engine& cuda_library_engine() {
  static const LibraryEngine engine;
  return engine;
}

}  // namespace cutloss
