#include "cuda/refusal.h"

#include "core/text.h"
#include "cuda/rows/row_facts.h"

namespace cutloss::cuda {

std::string index_refusal(const Problem& p, const DeviceFacts& device) {
  if (p.device_index < 0 || p.device_index == device.index) return "";
  return text("device_index is ", p.device_index, ", but the current CUDA device is ", device.index,
              ": make that one current, or leave device_index -1");
}

std::string common_refusal(const Problem& p, const DeviceFacts& device) {
  if (p.device != Device::cuda) return "the tensors are not in a CUDA device's memory";
  if (std::string refusal = index_refusal(p, device); !refusal.empty()) return refusal;
  if (device.sm < 75) {
    return text(device.name, " is sm_", device.sm, ", but sm_75 (Turing) or later is needed");
  }
  return size_refusal(p.rows, classes_of(p).total);
}

}  // namespace cutloss::cuda
