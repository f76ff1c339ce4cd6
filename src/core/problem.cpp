#include "cutloss/problem.h"

#include <array>

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

template <class P>
auto& classes_in(P& problem) {
  auto* linear = std::get_if<Linear>(&problem.source);
  return linear != nullptr ? linear->head.classes : logits_of(problem).classes;
}

}  // namespace

std::int64_t row_count(const Rows& rows) {
  return rows.sequences * (rows.length - settled_shift(rows));
}
std::int64_t row_count(const Problem& problem) { return row_count(problem.rows); }

const Head& head_of(const Problem& problem) { return source_of<Linear>(problem, kNoHead).head; }
Head& head_of(Problem& problem) { return source_of<Linear>(problem, kNoHead).head; }
const Logits& logits_of(const Problem& problem) { return source_of<Logits>(problem, kNoLogits); }
Logits& logits_of(Problem& problem) { return source_of<Logits>(problem, kNoLogits); }

const Classes& classes_of(const Problem& problem) { return classes_in(problem); }
Classes& classes_of(Problem& problem) { return classes_in(problem); }

bool wants_gradient(const Problem& problem) {
  const Wanted& w = problem.wanted;
  return w.de.wanted || w.dc.wanted || w.dbias.wanted || w.dlogits.wanted;
}

std::string_view name(DType type) {
  constexpr std::array<std::string_view, 4> names{"f32", "f64", "bf16", "f16"};
  return names.at(static_cast<std::size_t>(type));
}

std::string_view name(Schedule schedule) {
  constexpr std::array<std::string_view, 4> names{"automatic", "none", "rows", "vocabulary"};
  return names.at(static_cast<std::size_t>(schedule));
}

}  // namespace cutloss
