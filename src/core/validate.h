#pragma once

#include "core/engine.h"

namespace cutloss {

// Every refusal that follows from the problem alone. Returns the problem with its strides filled
// in. Throws Error(invalid_value | invalid_type).
Problem validated(Problem problem);

// The sizes of numbers that have a reciprocal in a stat dtype: an option outside would silently
// become 0 or infinity.
struct NumberRange {
  double least, most;
};
inline NumberRange usable_range(DType stat) {
  return stat == DType::f64 ? NumberRange{0x1p-1022, 0x1p1022} : NumberRange{0x1p-126, 0x1p126};
}

// Every refusal that follows from the pointers of a call: missing, misaligned, too small.
void check_args(const Plan& plan, const Args& args, Passes passes);

}  // namespace cutloss
