// The CUDA device that the calling thread works on.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "plan/device_facts.h"

namespace cutloss::cuda {

// Why nothing can run on a GPU here, in words; empty where something can.
std::string cuda_refusal();

// Facts of the current device, asked for once. Throws Error where there is none.
const DeviceFacts& current_device();

// The device that engines work on: the current one, or why there is none.
const DeviceFacts& device_or_none();

// Throws Error(out_of_memory | internal) with what failed, for any code but success.
void check(cudaError_t error, const char* what);

}  // namespace cutloss::cuda
