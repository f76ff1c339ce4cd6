// Plans that were made before: training asks for the same few again and again.
#pragma once

#include <memory>

#include "cutloss/plan.h"

namespace cutloss::spec {

// make_plan(problem). On CUDA the problem says the index of the device, which is current.
std::shared_ptr<const Plan> plan_for(const Problem& problem);

}  // namespace cutloss::spec
