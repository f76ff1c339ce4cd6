#pragma once

#include <string>

#include "cutloss/problem.h"
#include "plan/device_facts.h"

namespace cutloss::cuda {

// Why a problem for another device than this one cannot run now; empty where it is for this one.
std::string index_refusal(const Problem& problem, const DeviceFacts& device);

// Why no CUDA engine can do a problem on a device; empty where one may.
std::string common_refusal(const Problem& problem, const DeviceFacts& device);

}  // namespace cutloss::cuda
