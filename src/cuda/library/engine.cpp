#include "cuda/library/engine.h"

#include <array>

#include "core/text.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/library/tuning.h"
#include "cuda/refusal.h"

namespace cutloss {
namespace {

std::string description() {
  const DeviceFacts& device = cuda::current_device();
  return text(device.name, ", sm_", device.sm, ", ", device.multiprocessors, " multiprocessors, ",
              device.l2_bytes / cuda::kMiB, " MiB of L2; ", cuda::describe_cublaslt());
}

constexpr std::array kAlgorithms = {&cuda::library::forward_algorithm, &cuda::library::by_rows,
                                    &cuda::library::stored, &cuda::library::by_vocabulary};

}  // namespace

constinit const Engine cuda_library_engine{"cuda/library", cuda::device_or_none,
                                           description,    cuda::common_refusal,
                                           kAlgorithms,    cuda::library::tuning};

}  // namespace cutloss
