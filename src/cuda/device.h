// The CUDA device that the calling thread works on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace cutloss::cuda {

struct DeviceFacts {
  int index = 0;
  int sm = 0;  // compute capability: 90 for 9.0
  int multiprocessors = 0;
  std::int64_t l2_bytes = 0;
  std::int64_t shared_bytes = 0;  // that a block may ask for
  double memory_rate = 0;  // bytes a second that the memory's clock and width allow; 0: unknown
  std::string name;
};

// Why nothing can run on a GPU here, in words; empty where something can.
std::string cuda_refusal();

// Why a problem for the device of this index (-1: any) cannot run now; empty where it is current.
std::string index_refusal(int device_index);

// Facts of the current device, asked for once. Throws Error where there is none.
const DeviceFacts& current_device();

// Throws Error(out_of_memory | internal) with what failed, for any code but success.
void check(cudaError_t error, const char* what);

}  // namespace cutloss::cuda
