#include "cuda/device.h"

#include <map>
#include <mutex>

#include "core/text.h"
#include "cuda/cublaslt.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking a CUDA device for its properties");
  return value;
}

// The memory's bytes a second, 0 where the device or its driver does not tell. It is only a hint.
double memory_rate(int device) {
  int kilohertz = 0, bits = 0;
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
    cudaGetLastError();  // clears the error
    return 0;
  }
  return 1e3 * kilohertz * bits / 8 * 2;  // two transfers a cycle
}

DeviceFacts ask(int device) {
  DeviceFacts facts;
  facts.index = device;
  facts.sm = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
             attribute(cudaDevAttrComputeCapabilityMinor, device);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  facts.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  facts.memory_rate = memory_rate(device);
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
  cudaGetLastError();  // clears the error
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "no CUDA device";
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
    return text("the CUDA driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
                ", but this build of cutloss needs one for CUDA ", CUDART_VERSION / 1000,
                ".0 or later: update the driver, or build cutloss with the toolkit of CUDA ",
                driver / 1000);
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

const DeviceFacts& device_or_none() {
  // Each thread has its own, since the reason may change while the process lives.
  thread_local DeviceFacts none;
  none.absent = cuda_refusal();
  if (none.absent.empty()) none.absent = cublaslt_refusal();
  return none.absent.empty() ? current_device() : none;
}

namespace {

// Of a build that is not for this GPU, or not for this driver; empty of other errors.
std::string build_refusal(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "this build of cutloss has no code for this GPU, only for " CUTLOSS_CUDA_CODE
             ": build it for this one (CUTLOSS_CUDA_ARCHITECTURES), or for every one (unset)";
    case cudaErrorUnsupportedPtxVersion:
      return "for this GPU the driver would have to compile this build's code (" CUTLOSS_CUDA_CODE
             "), and is too old for it: update the driver, or build cutloss for this GPU "
             "(CUTLOSS_CUDA_ARCHITECTURES)";
    default:
      return "";
  }
}

}  // namespace

void check(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error
  if (const std::string why = build_refusal(error); !why.empty()) {
    throw Error(ErrorCode::unsupported,
                text("CUDA failed at ", action, " (", cudaGetErrorName(error), "): ", why));
  }
  throw Error(error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::internal,
              text("CUDA failed at ", action, ": ", cudaGetErrorString(error), " (",
                   cudaGetErrorName(error), ")"));
}

}  // namespace cutloss::cuda
