#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// parameter -= rate * gradient, count numbers of the device's memory, ordered on the stream.
cudaError_t descend(float* parameter, const float* gradient, std::int64_t count, float rate,
                    cudaStream_t stream);
