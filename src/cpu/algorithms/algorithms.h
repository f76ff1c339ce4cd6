#pragma once

#include "plan/algorithm.h"

namespace cutloss::cpu {

// A file each. The names are "cpu/forward" and so on.
const Algorithm& forward_algorithm();
const Algorithm& by_rows();
const Algorithm& stored();
const Algorithm& by_vocabulary();

}  // namespace cutloss::cpu
