#pragma once

#include "cuda/library/decision.h"

namespace cutloss::cuda::library {

extern const Algorithm forward_algorithm;
// These two are one file: the same steps, with backward in another call.
extern const Algorithm by_rows;
extern const Algorithm stored;
extern const Algorithm by_vocabulary;

}  // namespace cutloss::cuda::library
