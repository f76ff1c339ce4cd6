#pragma once

#include <string>

#include "cutloss/problem.h"

namespace cutloss::cuda {

// Why no CUDA engine can do a problem; empty where one may.
std::string common_refusal(const Problem& problem);

}  // namespace cutloss::cuda
