// What a call of a loss does, decided once for every language and framework.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cutloss/plan.h"

namespace cutloss::spec {

struct Decided {
  // Gradients are made along with the loss, by rows. Else forward makes statistics, and backward
  // the gradients.
  bool in_forward = false;
  std::shared_ptr<const Plan> plan;
  // Why gradients are not made along with the loss, though its weights are known in forward: the
  // reasons of the plan that was looked at for it.
  std::vector<std::string> not_in_forward;
};

// The plan of a problem. Its upstream.when says whether the weights of the rows' outputs are known
// in forward, up to one factor; where the plan makes no use of that, the problem that is planned is
// the same with gradients at_backward. Throws as make_plan.
Decided decide(const Problem& problem);

}  // namespace cutloss::spec
