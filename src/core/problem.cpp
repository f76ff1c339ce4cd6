#include "cutloss/problem.h"

#include "core/row_map.h"
#include "cutloss/error.h"

#include "core/refuse.h"

namespace cutloss {
namespace {

template <class Kind, class P>
auto& source_of(P& problem, const char* message) {
  if (auto* source = std::get_if<Kind>(&problem.source)) return *source;
  refuse_value(message);
}

constexpr const char* kNoHead =
    "the source of the problem is Logits, but the call needs Linear: the calls for logits are "
    "those of cutloss/logits.h, which take LogitsArgs and need no plan";
constexpr const char* kNoLogits =
    "the source of the problem is Linear, but the call needs Logits: set source = Logits{...}, or "
    "call make_plan and the calls that take a plan";

}  // namespace

std::int64_t row_count(const Rows& rows) {
  return rows.sequences * (rows.length - settled_shift(rows));
}
std::int64_t row_count(const Problem& problem) { return row_count(problem.rows); }

const Head& head_of(const Problem& problem) { return source_of<Linear>(problem, kNoHead).head; }
Head& head_of(Problem& problem) { return source_of<Linear>(problem, kNoHead).head; }
const Logits& logits_of(const Problem& problem) { return source_of<Logits>(problem, kNoLogits); }
Logits& logits_of(Problem& problem) { return source_of<Logits>(problem, kNoLogits); }

const Classes& classes_of(const Problem& problem) {
  const auto* linear = std::get_if<Linear>(&problem.source);
  return linear != nullptr ? linear->head.classes : logits_of(problem).classes;
}
Classes& classes_of(Problem& problem) {
  auto* linear = std::get_if<Linear>(&problem.source);
  return linear != nullptr ? linear->head.classes : logits_of(problem).classes;
}

bool wants_gradient(const Problem& problem) {
  const Wanted& w = problem.wanted;
  return w.de.wanted || w.dc.wanted || w.dbias.wanted || w.dlogits.wanted;
}

std::string_view name(DType type) {
  switch (type) {
    case DType::f32:
      return "f32";
    case DType::f64:
      return "f64";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
  }
  return "?";
}

std::string_view name(Schedule schedule) {
  switch (schedule) {
    case Schedule::automatic:
      return "automatic";
    case Schedule::none:
      return "none";
    case Schedule::rows:
      return "rows";
    case Schedule::vocabulary:
      return "vocabulary";
  }
  return "?";
}

}  // namespace cutloss
