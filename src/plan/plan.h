// make_plan for engines and a device that the caller chooses.
#pragma once

#include <span>

#include "cutloss/plan.h"
#include "plan/algorithm.h"

namespace cutloss {

// Finds an engine. Throws Error(invalid_value) where none has that name.
const Engine& engine_named(std::span<const Engine* const> engines, std::string_view name);

// Makes a plan with these engines, each as if it worked on the device that `given` describes, if it
// is not null. A plan for another device than the current one cannot be opened.
Plan make_plan(const Problem& problem, std::span<const Engine* const> engines,
               const DeviceFacts* given);
std::int64_t least_workspace(const Problem& problem, std::span<const Engine* const> engines,
                             const DeviceFacts* given);

}  // namespace cutloss
