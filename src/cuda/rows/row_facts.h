// What the kernels know of a call's rows, made of what its caller said.
#pragma once

#include <limits>
#include <string>

#include "cuda/rows/kernels.h"

namespace cutloss::cuda {

// Kernels count positions and columns in 32 bits. Why these are too many, in words; empty where
// they are not.
std::string size_refusal(const Rows& rows, std::int64_t V,
                         std::int64_t most_columns = std::numeric_limits<std::int32_t>::max());

// Of targets alone. Throws Error(unsupported) where there are too many.
RowFacts row_facts(const Rows& rows, const Classes& classes, const void* targets);

RowFacts row_facts(const LossRows& rows, const void* targets);

// With temperatures: `temperature` is read where the problem says that there is one for each row.
RowFacts row_facts(const Problem& problem, const void* targets, const void* temperature);

}  // namespace cutloss::cuda
