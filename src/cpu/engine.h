#pragma once

#include "plan/algorithm.h"

namespace cutloss {

const Engine& cpu_engine();

}  // namespace cutloss
