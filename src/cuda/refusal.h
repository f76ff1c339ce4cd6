// The refusals that CUDA engines have in common.
#pragma once

#include <string>

#include "cutloss/problem.h"
#include "plan/device_facts.h"

namespace cutloss::cuda {

// Says why a problem that is for another device than this one cannot run now, or nothing where it
// is for this one.
std::string index_refusal(const Problem& problem, const DeviceFacts& device);

// Says why no CUDA engine can do a problem on a device, or nothing where one may.
std::string common_refusal(const Problem& problem, const DeviceFacts& device);

}  // namespace cutloss::cuda
