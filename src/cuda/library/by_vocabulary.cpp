#include "cuda/library/components.h"
#include "cuda/library/engine.h"
#include "loops/steps.h"

namespace cutloss::cuda::library {

constinit const Algorithm by_vocabulary{"cuda/library/by_vocabulary",
                                        {Schedule::vocabulary, false},
                                        nullptr,
                                        decide,
                                        open_steps<RecomputingSteps, Components>};

}  // namespace cutloss::cuda::library
