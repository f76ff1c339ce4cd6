// The two differ in when the gradients are made: with the statistics, or in backward.
#include "cuda/library/components.h"
#include "cuda/library/engine.h"
#include "loops/steps.h"

namespace cutloss::cuda::library {

constinit const Algorithm by_rows{"cuda/library/by_rows",
                                  {Schedule::rows, false},
                                  nullptr,
                                  decide,
                                  open_steps<KeepingSteps, Components>};
constinit const Algorithm stored{"cuda/library/stored",
                                 {Schedule::rows, true},
                                 nullptr,
                                 decide,
                                 open_steps<KeepingSteps, Components>};

}  // namespace cutloss::cuda::library
