#pragma once

#include <span>
#include <string_view>

#include "plan/algorithm.h"

namespace cutloss {

// Every engine of this build, in the order in which a plan asks them.
std::span<const Engine* const> engines();
// Throws Error(invalid_value) where this build has none of that name.
const Engine& engine_named(std::string_view name);

}  // namespace cutloss
