// The table of oneDNN's functions, which the linker finds.
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/onednn.h"

namespace cutloss::cpu {

const OneDnn& onednn() {
#define CUTLOSS_ONEDNN_ADDRESS(name) &::name,
  static constexpr OneDnn functions{CUTLOSS_ONEDNN_FUNCTIONS(CUTLOSS_ONEDNN_ADDRESS)};
#undef CUTLOSS_ONEDNN_ADDRESS
  return functions;
}

std::string onednn_refusal() { return ""; }

}  // namespace cutloss::cpu
