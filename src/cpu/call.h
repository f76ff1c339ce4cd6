// A call of the CPU engine.
#pragma once

#include "cpu/decision.h"
#include "plan/call.h"

namespace cutloss::cpu {

using Call = CallOf<CpuDecision>;

}  // namespace cutloss::cpu
