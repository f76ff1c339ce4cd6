#pragma once

#include <cstdint>

namespace cutloss::cuda {

// A row-major matrix in device memory, ready for a product; its stride in elements.
struct Matrix {
  const void* data = nullptr;
  std::int64_t stride = 0;
};

}  // namespace cutloss::cuda
