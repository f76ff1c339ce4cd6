#include "cuda/library/components.h"
#include "cuda/library/engine.h"
#include "loops/steps.h"

namespace cutloss::cuda::library {

constinit const Algorithm forward_algorithm{"cuda/library/forward",
                                            {Schedule::none, false},
                                            nullptr,
                                            decide,
                                            open_steps<ForwardSteps, Components>};

}  // namespace cutloss::cuda::library
