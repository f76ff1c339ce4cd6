// The facts of a device that plans depend on. Decisions read nothing else of it, so that a test can
// invent them: Hopper's plans are tested where there is no GPU.
#pragma once

#include <cstdint>
#include <string>

namespace cutloss {

struct DeviceFacts {
  // The reason why nothing can run there; empty where something can.
  std::string absent;
  std::string name;
  // Whether a processor's products of bf16 operands run at bf16's speed.
  bool native_bf16 = false;
  // All that follows is for CUDA. The index of the device, and its compute capability: 90 for 9.0.
  int index = 0;
  int sm = 0;
  int multiprocessors = 0;
  std::int64_t l2_bytes = 0;
  // The shared memory that a block may ask for.
  std::int64_t shared_bytes = 0;
  // The bytes a second that the memory's clock and width allow; 0 where they are unknown.
  double memory_rate = 0;
};

}  // namespace cutloss
