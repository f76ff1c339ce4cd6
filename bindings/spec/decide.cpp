#include "spec/decide.h"

#include <algorithm>
#include <optional>

#include "cutloss/error.h"
#include "spec/plan_cache.h"

namespace cutloss::spec {
namespace {

// More rows than a call has, and the last that are tried.
constexpr std::int64_t kMostRows = std::int64_t{1} << 31;
// A step between two numbers of rows that are tried, in parts of the first of them.
constexpr std::int64_t kStepsOfRows = 32;

// Gradients by rows are made with the statistics, in one call.
bool is_in_one_call(const Plan& plan) {
  return plan.schedule == Schedule::rows && !plan.keeps_logits;
}

struct Way {
  bool in_forward;
  Schedule schedule;
  bool operator==(const Way&) const = default;
};

// Nothing where there is no plan.
std::optional<Way> way_of_rows(Problem p, std::int64_t rows) {
  p.rows.sequences = 1;
  p.rows.length = rows + p.rows.shift;
  if (p.rows.num_valid) p.rows.num_valid = std::max<std::int64_t>(rows - 1, 0);
  Head& head = head_of(p);
  head.e_sequence_stride = head.e_row_stride = 0;
  try {
    if (p.upstream.when == Upstream::at_forward && is_in_one_call(make_plan(p))) {
      return Way{true, Schedule::rows};
    }
  } catch (const Error&) {
    return std::nullopt;
  }
  if (p.schedule == Schedule::rows) return Way{false, Schedule::rows};
  return Way{false, Schedule::vocabulary};
}

}  // namespace

Decided decide(const Problem& problem) {
  auto plan = plan_for(problem);
  if (problem.upstream.when != Upstream::at_forward) return {false, std::move(plan), {}};
  if (is_in_one_call(*plan)) return {true, std::move(plan), {}};
  Problem later = problem;
  later.upstream.when = Upstream::at_backward;
  return {false, plan_for(later), plan->reasons};
}

std::vector<UpToRows> decide_for_rows(const Problem& problem) {
  std::vector<UpToRows> found;
  for (std::int64_t rows = 1; rows <= kMostRows;) {
    const auto way = way_of_rows(problem, rows);
    std::int64_t same = rows, other = kMostRows + 1;
    while (same < kMostRows && other > kMostRows) {
      const std::int64_t next = std::min(same + same / kStepsOfRows + 1, kMostRows);
      (way_of_rows(problem, next) == way ? same : other) = next;
    }
    while (other - same > 1) {
      const std::int64_t middle = same + (other - same) / 2;
      (way_of_rows(problem, middle) == way ? same : other) = middle;
    }
    rows = other;
    const bool goes_on = !found.empty() && (!way || (found.back().in_forward == way->in_forward &&
                                                     found.back().schedule == way->schedule));
    if (goes_on) {
      found.back().most = same;
    } else if (way) {
      found.push_back({same, way->in_forward, way->schedule});
    }
  }
  // No plan for any number of rows: the call says why.
  if (found.empty()) {
    const bool by_rows = problem.schedule == Schedule::rows;
    found.push_back({kMostRows, false, by_rows ? Schedule::rows : Schedule::vocabulary});
  }
  return found;
}

}  // namespace cutloss::spec
