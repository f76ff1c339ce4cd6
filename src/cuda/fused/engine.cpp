#include "cuda/fused/engine.h"

#include <array>

#include "core/text.h"
#include "cuda/device.h"
#include "cuda/fused/decision.h"
#include "cuda/fused/tuning.h"
#include "cuda/refusal.h"

namespace cutloss {
namespace {

std::string description() {
  const DeviceFacts& device = cuda::current_device();
  if (cuda::fused::kernels_of(device) == nullptr) {
    return text("not here: ", device.name, " is sm_", device.sm, ", not sm_90");
  }
  return text(device.name, ": TMA and WGMMA kernels; gradients' products as cuda/library");
}

std::string refusal(const Problem& p, const DeviceFacts& device) {
  const Head& head = head_of(p);
  if (std::string refusal = cuda::common_refusal(p, device); !refusal.empty()) return refusal;
  if (cuda::fused::kernels_of(device) == nullptr) {
    return text(device.name, " is sm_", device.sm, ", not sm_90 (Hopper)");
  }
  const DType operand = cuda::product_type(p, device);
  if (operand != DType::bf16 && operand != DType::f16) {
    return text("products are in ", name(operand), ", not bf16 or f16");
  }
  if (p.transform.softcap && *p.transform.softcap > cuda::fused::kMostSoftcap) {
    return text("softcap = ", *p.transform.softcap, " is over ", cuda::fused::kMostSoftcap,
                ", where these kernels' tanh would cost the logits digits");
  }
  if (head.D % 8 != 0) return text("D = ", head.D, " is not a multiple of 8");
  const auto uneven = [&](DType type, std::int64_t stride) {
    return type == operand && stride % 8 != 0;
  };
  if (uneven(head.e_type, head.e_row_stride) || uneven(head.e_type, head.e_sequence_stride) ||
      uneven(head.c_type, head.c_row_stride)) {
    return text("rows of E are ", head.e_row_stride, " and of C ", head.c_row_stride,
                " elements apart: not multiples of 8");
  }
  return "";
}

constexpr std::array kAlgorithms = {&cuda::fused::forward_algorithm, &cuda::fused::exponentials,
                                    &cuda::fused::stored, &cuda::fused::by_vocabulary};

}  // namespace

constinit const Engine cuda_fused_sm90_engine{"cuda/fused_sm90", cuda::device_or_none,
                                              description,       refusal,
                                              kAlgorithms,       cuda::fused::tuning};

}  // namespace cutloss
