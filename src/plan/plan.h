// make_plan, for engines and a device of one's own choice.
#pragma once

#include <span>

#include "cutloss/plan.h"
#include "plan/algorithm.h"

namespace cutloss {

// Throws Error(invalid_value) where there is none of that name.
const Engine& engine_named(std::span<const Engine* const> engines, std::string_view name);

// Of these engines; with `given`, each as if it worked on that device. What such a plan is for
// another device cannot be opened.
Plan make_plan(const Problem& problem, std::span<const Engine* const> engines,
               const DeviceFacts* given);
std::int64_t least_workspace(const Problem& problem, std::span<const Engine* const> engines,
                             const DeviceFacts* given);

}  // namespace cutloss
