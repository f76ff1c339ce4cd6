#include "cuda/library/engine.h"

#include <array>

#include "core/text.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/library/session.h"
#include "cuda/refusal.h"
#include "cuda/row_facts.h"

namespace cutloss {
namespace {

using namespace cuda;

class LibraryEngine final : public Engine {
 public:
  std::string_view name() const override { return "cuda/library"; }

  std::string description() const override {
    if (const std::string refusal = cuda_refusal(); !refusal.empty()) return "not here: " + refusal;
    const DeviceFacts& device = current_device();
    return text(device.name, ", sm_", device.sm, ", ", device.multiprocessors, " multiprocessors, ",
                device.l2_bytes / kMiB, " MiB of L2; ", describe_cublaslt());
  }

  std::string refusal(const Problem& p) const override { return common_refusal(p); }

  std::span<const Algorithm* const> algorithms() const override {
    static const std::array list = {&library::forward_algorithm(), &library::by_rows(),
                                    &library::stored(), &library::by_vocabulary()};
    return list;
  }
};

}  // namespace

std::string cuda::common_refusal(const Problem& p) {
  if (p.device != Device::cuda) return "the tensors are not in a CUDA device's memory";
  if (std::string refusal = cuda_refusal(); !refusal.empty()) return refusal;
  if (std::string refusal = index_refusal(p.device_index); !refusal.empty()) return refusal;
  const DeviceFacts& device = current_device();
  if (device.sm < 75) {
    return text(device.name, " is sm_", device.sm, ", but sm_75 (Turing) or later is needed");
  }
  const std::string too_large = size_refusal(p.rows, classes_of(p).count);
  if (!too_large.empty()) return too_large;
  return cublaslt_refusal();
}

const Engine& cuda_library_engine() {
  static const LibraryEngine engine;
  return engine;
}

}  // namespace cutloss
