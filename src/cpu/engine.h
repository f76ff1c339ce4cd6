// The engine for processors, and its algorithms.
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

extern const Engine cpu_engine;

namespace cpu {

extern const Algorithm forward_algorithm, by_rows, stored, by_vocabulary;

}  // namespace cpu
}  // namespace cutloss
