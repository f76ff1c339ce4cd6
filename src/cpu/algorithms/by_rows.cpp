// The two differ in when the gradients are made: with the statistics, or in backward.
#include "cpu/components.h"
#include "cpu/engine.h"
#include "loops/steps.h"

namespace cutloss::cpu {

constinit const Algorithm by_rows{
    "cpu/by_rows", {Schedule::rows, false}, nullptr, decide, open_steps<KeepingSteps, Components>};
constinit const Algorithm stored{
    "cpu/stored", {Schedule::rows, true}, nullptr, decide, open_steps<KeepingSteps, Components>};

}  // namespace cutloss::cpu
