// The GPU's memory and streams, for tests. In a build without CUDA, and on a machine without a GPU,
// no test gets as far as calling these.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef CUTLOSS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace cutloss::test::gpu {

#ifdef CUTLOSS_CUDA

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }

// Both wait for all work before and after.
inline void copy(void* to, const void* from, std::size_t bytes) {
  check(cudaDeviceSynchronize(), "work before a copy");
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
  check(cudaDeviceSynchronize(), "a copy");
}
inline void wait() { check(cudaDeviceSynchronize(), "waiting for the GPU"); }

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

#else

inline void* allocate(std::size_t) { std::abort(); }
inline void release(void*) { std::abort(); }
inline void copy(void*, const void*, std::size_t) { std::abort(); }
inline void wait() { std::abort(); }

#endif

}  // namespace cutloss::test::gpu
