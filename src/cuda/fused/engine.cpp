#include "cuda/fused/engine.h"

#include <array>

#include "core/text.h"
#include "cuda/device.h"
#include "cuda/fused/components.h"
#include "cuda/fused/tuning.h"
#include "cuda/refusal.h"

namespace cutloss {
namespace {

using namespace cuda;

class FusedSm90Engine final : public Engine {
 public:
  std::string_view name() const override { return "cuda/fused_sm90"; }

  std::string description() const override {
    if (const std::string refusal = cuda_refusal(); !refusal.empty()) return "not here: " + refusal;
    const DeviceFacts& device = current_device();
    if (device.sm != 90)
      return text("not here: ", device.name, " is sm_", device.sm, ", not sm_90");
    return text(device.name, ": TMA and WGMMA kernels; gradients' products as cuda/library");
  }

  std::string refusal(const Problem& p) const override {
    const Head& head = head_of(p);
    if (std::string refusal = common_refusal(p); !refusal.empty()) return refusal;
    const DeviceFacts& device = current_device();
    if (device.sm != 90) return text(device.name, " is sm_", device.sm, ", not sm_90 (Hopper)");
    const DType operand = product_type(p);
    if (operand != DType::bf16 && operand != DType::f16) {
      return text("products are in ", cutloss::name(operand), ", not bf16 or f16");
    }
    if (p.transform.softcap && *p.transform.softcap > fused::kMostSoftcap) {
      return text("softcap = ", *p.transform.softcap, " is over ", fused::kMostSoftcap,
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

  std::span<const Algorithm* const> algorithms() const override {
    static const std::array list = {&fused::forward_algorithm(), &fused::exponentials(),
                                    &fused::stored(), &fused::by_vocabulary()};
    return list;
  }
};

}  // namespace

const Engine& cuda_fused_sm90_engine() {
  static const FusedSm90Engine engine;
  return engine;
}

}  // namespace cutloss
