// What planning knows of a device. Decisions read nothing else of it, so that a test can say what
// it likes: Hopper's plans are tested where there is no GPU.
#pragma once

#include <cstdint>
#include <string>

namespace cutloss {

struct DeviceFacts {
  // Why nothing can run there, in words; empty where something can.
  std::string absent;
  std::string name;
  // CPU: products of bf16 operands run at bf16's speed.
  bool native_bf16 = false;
  // CUDA, all of these. The index of the device, and its compute capability: 90 for 9.0.
  int index = 0;
  int sm = 0;
  int multiprocessors = 0;
  std::int64_t l2_bytes = 0;
  // That a block may ask for.
  std::int64_t shared_bytes = 0;
  // Bytes a second that the memory's clock and width allow; 0: unknown.
  double memory_rate = 0;
};

}  // namespace cutloss
