#include "plan/decision.h"

#include "core/dtype.h"

namespace cutloss {

void set_problem(Decision& d, const Algorithm& algorithm, const Problem& p) {
  const Head& head = head_of(p);
  d.algorithm = &algorithm;
  d.problem = p;
  d.stat = stat_type(p);
  d.de_type = p.wanted.de.type.value_or(head.e_type);
  d.dc_type = p.wanted.dc.type.value_or(head.c_type);
  d.dbias_type = p.wanted.dbias.type.value_or(head.bias_type);
  d.last.begin = head.classes.count;
}

std::int64_t begin_of_last_columns(const Decision& d, bool in_place, std::int64_t unit) {
  const Head& head = head_of(d.problem);
  const Wanted& wanted = d.problem.wanted;
  const std::int64_t V = head.classes.count;
  // What is added to is never scratch.
  if (in_place || !wanted.de.wanted || !wanted.dc.wanted || wanted.dc.add) return V;
  const std::int64_t sums = row_count(d.problem) * head.D * size_of(d.stat) + kSumsAlign;
  const std::int64_t columns = divide_up(sums, head.D * size_of(d.dc_type));
  const std::int64_t begin = columns < V ? (V - columns) / unit * unit : 0;
  return begin > 0 ? begin : V;
}

void* sums_in_dc(const Decision& d, void* dc) {
  const auto first =
      reinterpret_cast<std::uintptr_t>(dc) +
      static_cast<std::uintptr_t>(d.last.begin * head_of(d.problem).D * size_of(d.dc_type));
  return reinterpret_cast<void*>((first + kSumsAlign - 1) / kSumsAlign * kSumsAlign);
}

}  // namespace cutloss
