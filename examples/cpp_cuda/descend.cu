#include "descend.h"

namespace {

__global__ void descend_kernel(float* parameter, const float* gradient, std::int64_t count,
                               float rate) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) parameter[i] -= rate * gradient[i];
}

}  // namespace

cudaError_t descend(float* parameter, const float* gradient, std::int64_t count, float rate,
                    cudaStream_t stream) {
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  descend_kernel<<<blocks, kThreads, 0, stream>>>(parameter, gradient, count, rate);
  return cudaGetLastError();
}
