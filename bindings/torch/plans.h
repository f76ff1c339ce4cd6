// Plans that were made before: training asks for the same few again and again.
#pragma once

#include <cstdint>
#include <memory>

#include "cutloss/cutloss.h"

namespace cutloss::binding {

// make_plan(problem), for the device that is current (`device`: its index; -1 on the CPU).
std::shared_ptr<const Plan> plan_for(const Problem& problem, std::int64_t device);

}  // namespace cutloss::binding
