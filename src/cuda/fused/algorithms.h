#pragma once

#include "cuda/fused/decision.h"

namespace cutloss::cuda::fused {

extern const Algorithm forward_algorithm;
// These two are one file: the same steps, with backward in another call.
extern const Algorithm exponentials;
extern const Algorithm stored;
extern const Algorithm by_vocabulary;

}  // namespace cutloss::cuda::fused
