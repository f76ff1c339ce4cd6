#include "cpu/components.h"
#include "cpu/engine.h"
#include "loops/steps.h"

namespace cutloss::cpu {

constinit const Algorithm by_vocabulary{"cpu/by_vocabulary",
                                        {Schedule::vocabulary, false},
                                        nullptr,
                                        decide,
                                        open_steps<RecomputingSteps, Components>};

}  // namespace cutloss::cpu
