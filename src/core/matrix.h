// Row-major matrices in the memory of either device.
#pragma once

#include <cstdint>

namespace cutloss {

// A matrix that is only read.
struct Matrix {
  const void* data = nullptr;
  // From a row to the next, in elements.
  std::int64_t stride = 0;
};

// A matrix that a product reads as it lies or transposed.
struct Operand : Matrix {
  bool transposed = false;
};

}  // namespace cutloss
