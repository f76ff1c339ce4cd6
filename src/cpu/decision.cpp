#include "cpu/decision.h"

#include <algorithm>

#include "core/dtype.h"
#include "cpu/gemm/gemm.h"
#include "cpu/tuning.h"
#include "cutloss/rows.h"
#include "plan/chunking.h"

namespace cutloss::cpu {
namespace {

// Sets what follows from the problem alone.
CpuDecision facts_of(const Algorithm& algorithm, const Problem& p, const DeviceFacts& device) {
  CpuDecision d;
  set_problem(d, algorithm, p, product_type(p, device));
  d.de_in_place = d.de_type == d.stat;
  return d;
}

Ledger workspace(const CpuDecision& d, Way way, Pass pass) {
  const Problem& p = d.problem;
  const Head& head = head_of(p);
  const Sizes& s = d.sizes;
  const std::int64_t operand = size_of(d.operand), stat = size_of(d.stat);
  const bool from_kept = way.schedule == Schedule::rows;
  Ledger ledger(64);
  ledger.book(buffer::kRowList, (1 + row_count(p)) * 8, Lifetime::call);
  if (makes_statistics(pass)) ledger.book(buffer::kStates, s.chunk_rows * row_state_bytes(d.stat));
  ledger.book(buffer::kE, s.block_rows * head.D * operand);
  if (d.converts_c) ledger.book(buffer::kC, s.slab * head.D * operand);
  if (d.converts_bias) ledger.book(buffer::kBias, head.classes.count * stat);
  if (makes_statistics(pass) || !from_kept) {
    ledger.book(buffer::kZ, s.block_rows * s.slab * stat);
  }
  if (!makes_gradients(pass)) return ledger;
  if (d.g_in_logits) {
    ledger.share(buffer::kG, s.block_rows * s.slab * operand, buffer::kZ, "the next block");
  } else {
    ledger.book(buffer::kG, s.block_rows * s.slab * operand);
  }
  book_sums(ledger, d, !d.de_in_place, !d.dc_in_place);
  return ledger;
}

Ledger kept(const CpuDecision& d, Way way) {
  Ledger ledger(64);
  if (way.schedule != Schedule::rows) return ledger;
  const Lifetime life = way.keeps_logits ? Lifetime::kept : Lifetime::seam;
  const std::int64_t V = classes_of(d.problem).count, rows = d.sizes.chunk_rows;
  const std::int64_t element = size_of(d.kept_type);
  ledger.book(buffer::kKept, (rows - d.rows_in_dc) * V * element, life);
  if (d.rows_in_dc > 0) {
    ledger.share(buffer::kKeptInDc, d.rows_in_dc * V * element, "dC", "the slab is written", life);
  }
  if (d.keeps_exponentials) {
    ledger.book(buffer::kMaxima, rows * d.slab_count() * size_of(d.stat), life);
  }
  return ledger;
}

void set_sizes(CpuDecision& d, Way way, Tile tile, std::int64_t chunk_rows) {
  const Problem& p = d.problem;
  const Head& head = head_of(p);
  Sizes& s = d.sizes;
  s.chunk_rows = even_piece(row_count(p), chunk_rows, kUnit);
  s.block_rows = even_piece(s.chunk_rows, tile.rows, kUnit);
  const bool first = tile.columns == kTiles[0].columns;
  s.slab =
      even_piece(head.classes.count, first ? columns_beside(s.block_rows) : tile.columns, kUnit);
  s.gradient_rows = s.block_rows;
  s.gradient_slab = s.slab;
  d.one_chunk = s.chunk_rows >= row_count(p);
  d.last = {d.last.begin, s.gradient_rows, s.gradient_slab};
  d.g_in_logits = d.operand != DType::bf16 && way.schedule != Schedule::rows;
  // With several blocks of rows a slab of dC may be written before the last block has been read,
  // unless its sums are elsewhere.
  const bool written_last = s.block_rows >= s.chunk_rows || !d.dc_in_place;
  const bool dc_is_there =
      p.wanted.dc.wanted && !p.wanted.dc.add && in_one_call(way) && d.one_chunk;
  d.rows_in_dc = dc_is_there && written_last
                     ? std::min(s.chunk_rows, head.D * size_of(d.dc_type) / size_of(d.kept_type))
                     : 0;
  d.kept = kept(d, way);
  d.forward = workspace(d, way, first_pass(way));
  d.backward = has_backward(way) ? workspace(d, way, Pass::backward) : Ledger();
}

// The time of forward and backward, in products: these, and what moves to and from memory beside
// them.
double predicted_time(const CpuDecision& d, Way way) {
  const Wanted& wanted = d.problem.wanted;
  const std::int64_t V = classes_of(d.problem).count;
  double time = products_of(d.problem, way);
  if (wanted.de.wanted) time += passes_over_sums(kFlopsPerByte, d.slab_count(), V);
  if (wanted.dc.wanted) {
    const std::int64_t blocks = divide_up(row_count(d.problem), d.sizes.block_rows);
    time +=
        passes_over_sums(kFlopsPerByte, blocks, std::max<std::int64_t>(row_count(d.problem), 1));
  }
  return time + static_cast<double>(V - d.last.begin) / static_cast<double>(V);
}

}  // namespace

DType product_type(const Problem& p, const DeviceFacts& device) {
  // No processor multiplies f16 with f32 sums, and f32 holds every f16.
  if (p.compute_type == DType::f16) return DType::f32;
  return p.compute_type == DType::bf16 && !device.native_bf16 ? DType::f32 : p.compute_type;
}

std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& p,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least) {
  const Way way = algorithm.way;
  const CpuDecision facts = facts_of(algorithm, p, device);
  const std::int64_t rows = std::max<std::int64_t>(row_count(p), 1);
  const std::int64_t V = classes_of(p).count;
  // Tries a tile with chunks of so many rows, and with dE's sums in dC from `last_begin` on.
  const auto attempt = [&](Tile tile, std::int64_t chunk, std::int64_t last_begin) {
    auto trial = std::make_shared<CpuDecision>(facts);
    trial->last.begin = last_begin;
    set_sizes(*trial, way, tile, chunk);
    trial->predicted_time = predicted_time(*trial, way);
    least = std::min(least, peak_bytes(*trial));
    return trial;
  };
  for (const Tile tile : kTiles) {
    const auto whole = attempt(tile, rows, V);
    const bool fits = peak_bytes(*whole) <= budget;
    const auto bytes = [&](std::int64_t chunk) { return peak_bytes(*attempt(tile, chunk, V)); };
    if (in_one_call(way)) {
      const std::int64_t chunk =
          largest_that_fits(kLeastChunk, std::min(rows, kMostChunk), kUnit, budget, bytes);
      if (chunk == 0 && !fits) continue;
      const auto parts = attempt(tile, std::max(chunk, kLeastChunk), V);
      // Of one chunk for everything and chunks of the most rows, the smaller is taken.
      const bool in_parts =
          !fits || (chunk >= std::min(rows, kMostChunk) && peak_bytes(*parts) < peak_bytes(*whole));
      return in_parts ? parts : whole;
    }
    if (way.schedule != Schedule::vocabulary) {
      if (fits) return whole;
      continue;
    }
    const auto found = with_sums_placed(
        facts, {budget, facts.de_in_place, kUnit, kLeastChunk, kUnit},
        [&](std::int64_t chunk, std::int64_t begin) { return attempt(tile, chunk, begin); }, bytes,
        [](const auto& trial) { return peak_bytes(*trial); },
        [](const auto& trial) { return trial->predicted_time; });
    if (peak_bytes(*found) <= budget) return found;
  }
  return nullptr;
}

}  // namespace cutloss::cpu
