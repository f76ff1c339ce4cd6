// This is the list of engines, and with them of algorithms, in the order in which a plan asks them.
// No other file knows what this build has.
#include <array>

#include "api/algorithms.h"
#include "core/refuse.h"
#include "cpu/device_calls.h"
#include "cpu/engine.h"
#ifdef CUTLOSS_CUDA_SM90
#include "cuda/fused/engine.h"
#endif
#ifdef CUTLOSS_CUDA
#include "cuda/device_calls.h"
#include "cuda/library/engine.h"
#endif

namespace cutloss {

std::span<const Engine* const> engines() {
  static constexpr std::array list = {
#ifdef CUTLOSS_CUDA_SM90
      &cuda_fused_sm90_engine,
#endif
#ifdef CUTLOSS_CUDA
      &cuda_library_engine,
#endif
      &cpu_engine,
  };
  return list;
}

const DeviceCalls& calls_of(Device device, [[maybe_unused]] const char* call) {
  if (device == Device::cpu) return cpu_calls();
#ifdef CUTLOSS_CUDA
  return cuda_calls();
#else
  refuse(ErrorCode::unsupported, call,
         ": the memory is a CUDA device's, but this build of cutloss has no CUDA engine");
#endif
}

}  // namespace cutloss
