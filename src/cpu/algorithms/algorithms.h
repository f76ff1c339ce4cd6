#pragma once

#include "plan/algorithm.h"

namespace cutloss::cpu {

extern const Algorithm forward_algorithm;
// These two are one file: the same steps, with backward in another call.
extern const Algorithm by_rows;
extern const Algorithm stored;
extern const Algorithm by_vocabulary;

}  // namespace cutloss::cpu
