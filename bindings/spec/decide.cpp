#include "spec/decide.h"

#include "spec/plan_cache.h"

namespace cutloss::spec {

Decided decide(const Problem& problem) {
  auto plan = plan_for(problem);
  if (problem.upstream.when != Upstream::at_forward) return {false, std::move(plan), {}};
  if (plan->schedule == Schedule::rows && !plan->keeps_logits) return {true, std::move(plan), {}};
  Problem later = problem;
  later.upstream.when = Upstream::at_backward;
  return {false, plan_for(later), plan->reasons};
}

}  // namespace cutloss::spec
