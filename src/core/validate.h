#pragma once

#include "core/engine.h"

namespace cutloss {

// Every refusal that follows from the problem alone. Returns the problem with its strides filled
// in. Throws Error(invalid_value | invalid_type).
Problem validated(Problem problem);

// Every refusal that follows from the pointers of a call: missing, misaligned, too small.
void check_args(const Plan& plan, const Args& args, Passes passes);

}  // namespace cutloss
