// Numbers of every dtype, read and written as doubles. The reference has its own conversions, so
// that a defect in the engines' conversions shows up as a difference.
#pragma once

#include <cstdint>

#include "cutloss/cutloss.h"

namespace cutloss::reference {

std::int64_t bytes_of(DType type);

double load(const void* array, DType type, std::int64_t index);
// Rounds to nearest, ties to even; beyond the largest finite number lies infinity.
void store(void* array, DType type, std::int64_t index, double value);

// The number of this dtype that is nearest to value.
double rounded(double value, DType type);

// Half the distance from 1 to the next number: the largest relative error of one rounding.
double unit_roundoff(DType type);
// The smallest number above 0: the largest absolute error of a rounding near 0 is half of it.
double smallest(DType type);

}  // namespace cutloss::reference
