#pragma once

#include "plan/algorithm.h"

namespace cutloss {

extern const Engine cpu_engine;

}  // namespace cutloss
