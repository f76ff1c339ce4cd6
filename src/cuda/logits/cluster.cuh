// Wrappers of instructions that some GPUs have and others lack: copies that run on their own
// (sm_80), and clusters of blocks that see each other's shared memory (sm_90). They need PTX ISA
// 7.8 or later.
#pragma once

#include <cstdint>

namespace cutloss::cuda {

// Copies 16 bytes to shared memory. This thread sees them after fetch_wait; before sm_80 at once.
__device__ __forceinline__ void fetch(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Closes a group of this thread's copies; a group may be empty.
__device__ __forceinline__ void fetch_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of the thread's last groups are under way.
template <int kPending>
__device__ __forceinline__ void fetch_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Every thread of the cluster arrives, then waits for all others. What was written to shared memory
// before the arrival is seen after the wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// Arrives where nothing was written for others: no fence waits for the thread's own stores.
__device__ __forceinline__ void cluster_arrive_after_reads() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Returns the address of the same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ const T* in_block(const T* shared, int block) {
#if __CUDA_ARCH__ >= 900
  std::uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(there)
               : "l"(reinterpret_cast<std::uint64_t>(shared)), "r"(block));
  return reinterpret_cast<const T*>(there);
#else
  return shared;
#endif
}

}  // namespace cutloss::cuda
