#include "cuda/device.h"

#include <map>
#include <mutex>

#include "core/text.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking a CUDA device for its properties");
  return value;
}

DeviceFacts ask(int device) {
  DeviceFacts facts;
  facts.index = device;
  facts.sm = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
             attribute(cudaDevAttrComputeCapabilityMinor, device);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  facts.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  // The clock in kHz, the width in bits, two transfers a cycle.
  facts.memory_rate = 1e3 * attribute(cudaDevAttrMemoryClockRate, device) *
                      attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8 * 2;
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "asking a CUDA device for its name");
  facts.name = properties.name;
  return facts;
}

}  // namespace

std::string cuda_refusal() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();  // it has been seen
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "no CUDA device";
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
    return text("the CUDA driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
                ", but this build needs one for CUDA ", CUDART_VERSION / 1000,
                ".0 or later: update the driver");
  }
  return text("CUDA does not start: ", cudaGetErrorString(error));
}

const DeviceFacts& current_device() {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current CUDA device");
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been seen
  throw Error(error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::internal,
              text("CUDA failed at ", what, ": ", cudaGetErrorString(error), " (",
                   cudaGetErrorName(error), ")"));
}

}  // namespace cutloss::cuda
