#include "cuda/decision.h"

#include "core/dtype.h"
#include "core/sizes.h"
#include "core/text.h"
#include "cuda/device.h"

namespace cutloss::cuda {

DType product_type(const Problem& p, const DeviceFacts& device) {
  const Head& head = head_of(p);
  switch (p.compute_type) {
    case DType::f64:
      return DType::f64;
    case DType::bf16:  // tensor cores of sm_75 know fp16 only
      return device.sm >= 80 ? DType::bf16 : DType::f32;
    case DType::f16:  // f32 holds every f16; the reverse would lose range
      return head.e_type == DType::f16 && head.c_type == DType::f16 ? DType::f16 : DType::f32;
    case DType::f32:
      break;
  }
  return DType::f32;
}

void set_facts(CudaDecision& d, const Algorithm& algorithm, const Problem& p,
               const DeviceFacts& device) {
  const Head& head = head_of(p);
  d.algorithm = &algorithm;
  d.problem = p;
  d.device = device.index;
  d.multiprocessors = device.multiprocessors;
  d.operand = product_type(p, device);
  d.last.begin = head.classes.count;
  d.stat = stat_type(p);
  const bool one_run = p.rows.shift == 0 || p.rows.sequences == 1;
  d.identity = one_run && p.rows.num_valid == row_count(p);
  const bool even =
      p.rows.sequences == 1 ||
      (p.rows.shift == 0 && head.e_sequence_stride == p.rows.length * head.e_row_stride);
  d.evenly = even && head.e_type == d.operand;
  d.converts_c = head.c_type != d.operand;
  d.converts_bias = head.has_bias && head.bias_type != d.stat;
  d.keeps_exponentials = !p.upstream.entropy && !(p.transform.softcap && p.upstream.zbar);
  d.kept_type = d.keeps_exponentials ? d.operand : d.stat;
  d.de_in_place = d.identity && head.e_type == d.stat;
  d.dc_in_place = head.c_type == d.stat;
}

void set_places(CudaDecision& d, Way way) {
  d.one_chunk = d.sizes.chunk_rows >= row_count(d.problem);
  d.one_product_makes_dc =
      head_of(d.problem).c_type == d.operand && d.sizes.gradient_rows >= row_count(d.problem);
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
         !d.de_in_place && size_of(head_of(p).e_type) == size_of(d.operand);
}

const CudaDecision& on_current_device(const CudaDecision& d) {
  const int now = current_device().index;
  if (now == d.device) return d;
  throw Error(ErrorCode::invalid_value,
              text("the plan was made on CUDA device ", d.device, ", but the current device is ",
                   now, ": make it current, or make a plan there"));
}

void book_rows(Ledger& ledger, const CudaDecision& d) {
  const std::int64_t N = row_count(d.problem);
  ledger.book(buffer::kCounts, 2 * 4);
  ledger.book(buffer::kRows, N * 8);
  ledger.book(buffer::kPositions, N * 4);
  ledger.book(buffer::kTargets, N * 4);
  ledger.book(buffer::kInvTemperature, N * size_of(d.stat));
}

std::int64_t padded(std::int64_t columns, DType type) {
  return round_up(columns, 16 / size_of(type));
}

std::int64_t e_stride(const Problem& p, DType operand) { return padded(head_of(p).D, operand); }

}  // namespace cutloss::cuda
