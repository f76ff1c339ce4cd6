#include "cpu/cpu_engine.h"

#include <algorithm>
#include <array>
#include <limits>

#include <omp.h>

#include "core/dtype.h"
#include "core/sizes.h"
#include "core/text.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/parts.h"
#include "cpu/row_ops.h"

namespace cutloss {
namespace {

using namespace cpu;

// Rows and columns of one product, largest first; smaller ones where memory is short.
struct Tile {
  std::int64_t rows, columns;
};
constexpr std::array<Tile, 6> kTiles = {
    {{2048, 1024}, {1024, 1024}, {512, 512}, {256, 256}, {128, 128}, {64, 64}}};

// A block of logits in fp32 stays within 4 MB, and within 2 MB where rows are few; with very few
// a slab takes more columns, so that a product stays worth its call.
std::int64_t columns_beside(std::int64_t rows) {
  const std::int64_t in_4mb = std::max<std::int64_t>((std::int64_t{1} << 20) / rows, 512);
  const std::int64_t in_2mb = std::max<std::int64_t>((std::int64_t{1} << 19) / rows, 1024);
  return std::min({in_4mb, in_2mb, kMostColumns});
}

// Rows kept at a time, the most first: each chunk reads and writes dC's sums once.
constexpr std::array<std::int64_t, 5> kChunkRows = {2048, 1024, 512, 256, 128};

void set_sizes(Plan& plan, Tile tile, std::int64_t chunk_rows) {
  const Problem& p = plan.problem;
  plan.chunk_rows = even_piece(row_count(p), chunk_rows, 16);
  plan.block_rows = even_piece(plan.chunk_rows, tile.rows, 16);
  const std::int64_t columns =
      tile.columns == kTiles[0].columns ? columns_beside(plan.block_rows) : tile.columns;
  plan.slab = even_piece(p.V, columns, 16);
  plan.gradient_rows = plan.block_rows;
  plan.gradient_slab = plan.slab;
  plan.kept_bytes = kept_layout(plan).bytes;
  if (plan.schedule == Schedule::rows && !plan.keeps_logits) {
    plan.forward_workspace_bytes = workspace_layout(plan, {true, true}).bytes;
    plan.backward_workspace_bytes = 0;
  } else {
    plan.forward_workspace_bytes = workspace_layout(plan, {true, false}).bytes;
    plan.backward_workspace_bytes =
        plan.schedule == Schedule::none ? 0 : workspace_layout(plan, {false, true}).bytes;
  }
}

class CpuEngine final : public Engine {
 public:
  CpuEngine() {
    if (!onednn_refusal().empty()) return;
    if (!has_avx512()) forbid_avx512();  // one switch, oneDNN's, for both libraries
  }

  std::string_view name() const override { return "cpu"; }

  std::string description() const override {
    if (const std::string refusal = onednn_refusal(); !refusal.empty()) {
      return "not here: " + refusal;
    }
    return text(describe_onednn(), "; ", describe_openblas(), "; vectors ", vector_target(), "; ",
                omp_get_max_threads(), " threads");
  }

  std::string refusal(const Problem& p) const override {
    return p.device == Device::cpu ? onednn_refusal() : "the tensors are not in host memory";
  }

  bool fit(Plan& plan, std::int64_t budget, std::int64_t& smallest) const override {
    smallest = std::numeric_limits<std::int64_t>::max();
    const std::int64_t rows = row_count(plan.problem);
    for (const Tile tile : kTiles) {
      Plan best = plan;
      bool found = false;
      for (const std::int64_t chunk : chunk_sizes(plan, rows)) {
        Plan trial = plan;
        set_sizes(trial, tile, chunk);
        smallest = std::min(smallest, peak_bytes(trial));
        if (peak_bytes(trial) > budget) continue;
        // The whole in one chunk, or chunks of 2048: the smaller of the two.
        if (!found || (chunk >= kChunkRows[0] && peak_bytes(trial) < peak_bytes(best))) {
          best = trial;
          found = true;
        }
      }
      if (found) {
        plan = best;
        return true;
      }
    }
    return false;
  }

  std::unique_ptr<Parts> bind(const Plan& plan, const Args& args, Passes passes) const override {
    return bind_parts(plan, args, passes);
  }

 private:
  // All rows at once where the schedule says so; by rows, quickest first.
  static std::vector<std::int64_t> chunk_sizes(const Plan& plan, std::int64_t rows) {
    const std::int64_t all = std::max<std::int64_t>(rows, 1);
    std::vector<std::int64_t> sizes = {all};
    if (plan.schedule == Schedule::rows && !plan.keeps_logits) {
      for (const std::int64_t chunk : kChunkRows) {
        if (chunk < all) sizes.push_back(chunk);
      }
    }
    return sizes;
  }
};

}  // namespace

const Engine& cpu_engine() {
  static const CpuEngine engine;
  return engine;
}

}  // namespace cutloss
