// The CUDA device that the calling thread works on.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "plan/device_facts.h"

namespace cutloss::cuda {

// Says why nothing can run on a GPU here, or nothing where something can.
std::string cuda_refusal();

// The facts of the current device, which is asked for them once. Throws Error where there is none.
const DeviceFacts& current_device();

// The device that engines work on: the current one, or facts that say why there is none.
const DeviceFacts& device_or_none();

// Throws Error that names the action, for any code but success: out_of_memory, unsupported where
// this build is for other GPUs or newer drivers, else internal.
void check(cudaError_t error, const char* action);

}  // namespace cutloss::cuda
