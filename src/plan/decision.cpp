#include "plan/decision.h"

#include "core/dtype.h"
#include "plan/buffers.h"

namespace cutloss {

void set_problem(Decision& d, const Algorithm& algorithm, const Problem& p, DType operand) {
  const Head& head = head_of(p);
  d.algorithm = &algorithm;
  d.problem = p;
  d.operand = operand;
  d.stat = stat_type(p);
  d.de_type = p.wanted.de.type.value_or(head.e_type);
  d.dc_type = p.wanted.dc.type.value_or(head.c_type);
  d.dbias_type = p.wanted.dbias.type.value_or(head.bias_type);
  d.converts_c = head.c_type != d.operand;
  d.converts_bias = head.has_bias && head.bias_type != d.stat;
  d.dc_in_place = d.dc_type == d.stat;
  d.keeps_exponentials = !p.upstream.entropy && !(p.transform.softcap && p.upstream.zbar);
  d.kept_type = d.keeps_exponentials ? d.operand : d.stat;
  d.last.begin = head.classes.count;
}

std::int64_t begin_of_last_columns(const Decision& d, bool in_place, std::int64_t unit) {
  const Head& head = head_of(d.problem);
  const Wanted& wanted = d.problem.wanted;
  const std::int64_t V = head.classes.count;
  // A gradient that is added to is never scratch.
  if (in_place || !wanted.de.wanted || !wanted.dc.wanted || wanted.dc.add) return V;
  const std::int64_t sums = row_count(d.problem) * head.D * size_of(d.stat) + kSumsAlign;
  const std::int64_t columns = divide_up(sums, head.D * size_of(d.dc_type));
  const std::int64_t begin = columns < V ? (V - columns) / unit * unit : 0;
  return begin > 0 ? begin : V;
}

void book_sums(Ledger& ledger, const Decision& d, bool has_de_sums, bool has_dc_sums) {
  const Wanted& wanted = d.problem.wanted;
  const Head& head = head_of(d.problem);
  const std::int64_t row_bytes = head.D * size_of(d.stat), V = head.classes.count;
  if (d.has_de_sums_in_dc()) {
    ledger.share(buffer::kDeSums, d.sizes.chunk_rows * row_bytes, "dC", "its last rows are made");
  } else if (wanted.de.wanted && has_de_sums) {
    ledger.book(buffer::kDeSums, d.sizes.chunk_rows * row_bytes);
  }
  if (wanted.dc.wanted && has_dc_sums) {
    ledger.book(buffer::kDcSums, (d.one_chunk ? d.sizes.gradient_slab : V) * row_bytes,
                d.one_chunk ? Lifetime::step : Lifetime::call);
  }
  if (wanted.dbias.wanted) ledger.book(buffer::kDbiasSums, V * 8, Lifetime::call);
}

void* sums_in_dc(const Decision& d, void* dc) {
  const auto first =
      reinterpret_cast<std::uintptr_t>(dc) +
      static_cast<std::uintptr_t>(d.last.begin * head_of(d.problem).D * size_of(d.dc_type));
  return reinterpret_cast<void*>((first + kSumsAlign - 1) / kSumsAlign * kSumsAlign);
}

}  // namespace cutloss
