#include "cpu/components.h"
#include "cpu/engine.h"
#include "loops/steps.h"

namespace cutloss::cpu {

constinit const Algorithm forward_algorithm{
    "cpu/forward", {Schedule::none, false}, nullptr, decide, open_steps<ForwardSteps, Components>};

}  // namespace cutloss::cpu
