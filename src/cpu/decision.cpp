#include "cpu/decision.h"

#include <algorithm>
#include <vector>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "cpu/gemm.h"
#include "cpu/tuning.h"

namespace cutloss::cpu {
namespace {

// What follows from the problem and the way alone.
CpuDecision facts_of(const Algorithm& algorithm, const Problem& p, const DeviceFacts& device) {
  const Head& head = head_of(p);
  CpuDecision d;
  d.algorithm = &algorithm;
  d.problem = p;
  d.operand = product_type(p, device);
  d.stat = stat_type(p);
  d.converts_c = head.c_type != d.operand;
  d.converts_bias = head.has_bias && head.bias_type != d.stat;
  d.de_in_place = head.e_type == d.stat;
  d.dc_in_place = head.c_type == d.stat;
  d.keeps_exponentials = !p.upstream.entropy && !(p.transform.softcap && p.upstream.zbar);
  d.kept_type = d.keeps_exponentials ? d.operand : d.stat;
  return d;
}

Ledger workspace(const CpuDecision& d, Way way, Pass pass) {
  const Problem& p = d.problem;
  const Head& head = head_of(p);
  const Sizes& s = d.sizes;
  const std::int64_t V = head.classes.count;
  const std::int64_t operand = size_of(d.operand), stat = size_of(d.stat);
  const std::int64_t state =
      d.stat == DType::f64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
  const bool from_kept = way.schedule == Schedule::rows;
  Ledger ledger(64);
  ledger.book(buffer::kRowList, (1 + row_count(p)) * 8);
  if (makes_statistics(pass)) ledger.book(buffer::kStates, s.chunk_rows * state);
  ledger.book(buffer::kE, s.block_rows * head.D * operand);
  if (d.converts_c) ledger.book(buffer::kC, s.slab * head.D * operand);
  if (d.converts_bias) ledger.book(buffer::kBias, V * stat);
  if (makes_statistics(pass) || !from_kept) {
    ledger.book(buffer::kZ, s.block_rows * s.slab * stat);
  }
  if (!makes_gradients(pass)) return ledger;
  if (d.g_in_logits) {
    ledger.share(buffer::kG, s.block_rows * s.slab * operand, buffer::kZ, "the next block");
  } else {
    ledger.book(buffer::kG, s.block_rows * s.slab * operand);
  }
  if (p.wanted.de.wanted && !d.de_in_place) {
    ledger.book(buffer::kDeSums, s.chunk_rows * head.D * stat);
  }
  if (p.wanted.dc.wanted && !d.dc_in_place) {
    ledger.book(buffer::kDcSums, (d.one_chunk ? s.slab : V) * head.D * stat);
  }
  if (p.wanted.dbias.wanted) ledger.book(buffer::kDbiasSums, V * 8);
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
  d.last.begin = head.classes.count;
  d.g_in_logits = d.operand != DType::bf16 && way.schedule != Schedule::rows;
  // With several blocks of rows a slab of dC may be written before the last block has been read,
  // unless its sums are elsewhere.
  const bool written_last = s.block_rows >= s.chunk_rows || !d.dc_in_place;
  const bool dc_is_there = p.wanted.dc.wanted && in_one_call(way) && d.one_chunk;
  d.rows_in_dc = dc_is_there && written_last
                     ? std::min(s.chunk_rows, head.D * size_of(head.c_type) / size_of(d.kept_type))
                     : 0;
  d.kept = kept(d, way);
  d.forward = workspace(d, way, first_pass(way));
  d.backward = has_backward(way) ? workspace(d, way, Pass::backward) : Ledger();
}

// All rows at once where nothing else is to be had; with the gradients, quickest first.
std::vector<std::int64_t> chunk_sizes(Way way, std::int64_t rows) {
  const std::int64_t all = std::max<std::int64_t>(rows, 1);
  std::vector<std::int64_t> sizes = {all};
  if (!in_one_call(way)) return sizes;
  for (const std::int64_t chunk : kChunkRows) {
    if (chunk < all) sizes.push_back(chunk);
  }
  return sizes;
}

}  // namespace

DType product_type(const Problem& p, const DeviceFacts& device) {
  switch (p.compute_type) {
    case DType::f64:
      return DType::f64;
    case DType::bf16:
      return device.native_bf16 ? DType::bf16 : DType::f32;
    case DType::f16:  // no processor multiplies f16 with f32 sums; f32 holds every f16
    case DType::f32:
      return DType::f32;
  }
  return DType::f32;
}

std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& p,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least) {
  const Way way = algorithm.way;
  const CpuDecision facts = facts_of(algorithm, p, device);
  for (const Tile tile : kTiles) {
    std::shared_ptr<CpuDecision> best;
    for (const std::int64_t chunk : chunk_sizes(way, row_count(p))) {
      auto trial = std::make_shared<CpuDecision>(facts);
      set_sizes(*trial, way, tile, chunk);
      least = std::min(least, peak_bytes(*trial));
      if (peak_bytes(*trial) > budget) continue;
      // The whole in one chunk, or chunks of 2048: the smaller of the two.
      if (!best || (chunk >= kChunkRows[0] && peak_bytes(*trial) < peak_bytes(*best))) {
        best = trial;
      }
    }
    if (best) return best;
  }
  return nullptr;
}

}  // namespace cutloss::cpu
