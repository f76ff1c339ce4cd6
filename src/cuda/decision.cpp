#include "cuda/decision.h"

#include "core/dtype.h"
#include "core/refuse.h"
#include "core/sizes.h"
#include "cuda/device.h"
#include "cuda/tuning.h"
#include "plan/chunking.h"

namespace cutloss::cuda {

DType product_type(const Problem& p, const DeviceFacts& device) {
  const Head& head = head_of(p);
  // f32 holds every f16, but f16 would lose the range of others. The tensor cores of sm_75 know no
  // bf16.
  const bool narrows =
      p.compute_type == DType::f16 && (head.e_type != DType::f16 || head.c_type != DType::f16);
  const bool lacks_bf16 = p.compute_type == DType::bf16 && device.sm < 80;
  return narrows || lacks_bf16 ? DType::f32 : p.compute_type;
}

void set_facts(CudaDecision& d, const Algorithm& algorithm, const Problem& p,
               const DeviceFacts& device) {
  const Head& head = head_of(p);
  set_problem(d, algorithm, p, product_type(p, device));
  d.device = device.index;
  d.multiprocessors = device.multiprocessors;
  const bool one_run = p.rows.shift == 0 || p.rows.sequences == 1;
  d.identity = one_run && p.rows.num_valid == row_count(p);
  const bool even =
      p.rows.sequences == 1 ||
      (p.rows.shift == 0 && head.e_sequence_stride == p.rows.length * head.e_row_stride);
  d.evenly = even && head.e_type == d.operand;
  d.de_in_place = d.identity && d.de_type == d.stat;
}

void set_places(CudaDecision& d, Way way) {
  d.one_chunk = d.sizes.chunk_rows >= row_count(d.problem);
  const auto one_product = [&](std::int64_t rows) {
    return d.dc_type == d.operand && rows >= row_count(d.problem);
  };
  d.one_product_makes_dc = one_product(d.sizes.gradient_rows);
  d.one_product_makes_last_dc = one_product(d.last.gradient_rows);
  d.g_in_kept = in_one_call(way) && d.kept_type == d.operand;
}

bool reads_e_in_place(const CudaDecision& d, Way way, Pass pass) {
  if (!d.evenly) return false;
  const Rows& rows = d.problem.rows;
  if (rows.num_valid == row_count(rows)) return true;
  // Logits of rows that do not count are computed and left alone.
  return !rows.num_valid && pass == Pass::forward && way.schedule != Schedule::rows;
}

bool packs_e_in_de(const CudaDecision& d, Way way, Pass pass) {
  const Problem& p = d.problem;
  return p.wanted.de.wanted && pass == Pass::backward && !reads_e_in_place(d, way, pass) &&
         !d.de_in_place && size_of(d.de_type) >= size_of(d.operand) && d.one_chunk;
}

void need_current_device(const CudaDecision& d) {
  const int now = current_device().index;
  if (now == d.device) return;
  refuse_value("the plan was made on CUDA device ", d.device, ", but the current device is ", now,
               ": make it current, or make a plan there");
}

void book_rows(Ledger& ledger, const CudaDecision& d) {
  const std::int64_t N = row_count(d.problem);
  ledger.book(buffer::kCounts, 2 * 4, Lifetime::call);
  ledger.book(buffer::kRows, N * 8, Lifetime::call);
  ledger.book(buffer::kPositions, N * 4, Lifetime::call);
  ledger.book(buffer::kTargets, N * 4, Lifetime::call);
  ledger.book(buffer::kInvTemperature, N * size_of(d.stat), Lifetime::call);
}

std::int64_t padded(std::int64_t columns, DType type) {
  return round_up(columns, 16 / size_of(type));
}

std::int64_t e_stride(const Problem& p, DType operand) { return padded(head_of(p).D, operand); }

namespace {

// The bytes that dC of the last columns needs in g's memory where E lay in dE's: g of a block, and
// behind it E of its rows and dC's sums of its columns.
struct LastBytes {
  std::int64_t g = 0, e = 0, sums = 0;
  std::int64_t all() const { return g + e + sums; }
};
LastBytes last_bytes(const CudaDecision& d, std::int64_t rows, std::int64_t slab) {
  const Problem& p = d.problem;
  const std::int64_t operand = size_of(d.operand);
  const std::int64_t sums = d.dc_in_place ? 0 : slab * head_of(p).D * size_of(d.stat);
  return {round_up(rows * padded(slab, d.operand) * operand, kAlign),
          round_up(rows * e_stride(p, d.operand) * operand, kAlign), round_up(sums, kAlign)};
}

}  // namespace

void book_g(Ledger& ledger, const CudaDecision& d, const Reads& reads) {
  const Sizes& s = d.sizes;
  const std::int64_t g = s.gradient_rows * padded(s.gradient_slab, d.operand) * size_of(d.operand);
  if (!d.packs_last_e || !reads.e_in_de) {
    ledger.book(buffer::kG, g);
    return;
  }
  const LastBytes last = last_bytes(d, d.last.gradient_rows, d.last.gradient_slab);
  ledger.book(buffer::kG, std::max(g, last.all()));
  const char* until = "the call ends";
  ledger.share(buffer::kLastE, last.e, buffer::kG, until, Lifetime::step, last.g);
  if (last.sums > 0) {
    ledger.share(buffer::kLastDcSums, last.sums, buffer::kG, until, Lifetime::step,
                 last.g + last.e);
  }
}

void set_last(CudaDecision& d, Way way) {
  const Sizes& s = d.sizes;
  d.last.gradient_rows = s.gradient_rows;
  d.last.gradient_slab = s.gradient_slab;
  d.packs_last_e =
      d.has_de_sums_in_dc() && packs_e_in_de(d, way, Pass::backward) && !d.finds_last_e;
  if (!d.packs_last_e) return;
  const std::int64_t g = s.gradient_rows * padded(s.gradient_slab, d.operand) * size_of(d.operand);
  for (std::int64_t rows = std::min(kMostLastRows, round_up(s.chunk_rows, kLeastLastRows));;
       rows /= 2) {
    const auto bytes = [&](std::int64_t slab) { return last_bytes(d, rows, slab).all(); };
    const std::int64_t slab = largest_that_fits(128, s.gradient_slab, 128, g, bytes);
    if (slab < kLeastLastSlab && rows > kLeastLastRows) continue;
    d.last.gradient_rows = std::min(rows, s.chunk_rows);
    d.last.gradient_slab = std::max<std::int64_t>(slab, 128);
    return;
  }
}

}  // namespace cutloss::cuda
