// Makes what the kernels know of a call's rows from the problem and its pointers.
#pragma once

#include <limits>
#include <string>

#include "cuda/rows/kernels.h"

namespace cutloss::cuda {

// Says why a problem has too many positions or columns, which kernels count in 32 bits, or nothing
// where it has not.
std::string size_refusal(const Rows& rows, std::int64_t V,
                         std::int64_t most_columns = std::numeric_limits<std::int32_t>::max());

// Facts of targets alone. Throws Error(unsupported) where there are too many.
RowFacts row_facts(const Rows& rows, const Classes& classes, const void* targets);

RowFacts row_facts(const LossRows& rows, const void* targets);

// Facts of targets and temperatures. `temperature` is read where each row has one of its own.
RowFacts row_facts(const Problem& problem, const void* targets, const void* temperature);

}  // namespace cutloss::cuda
