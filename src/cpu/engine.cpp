// The engine for processors: oneDNN's and OpenBLAS's products, own row work.
#include "cpu/engine.h"

#include <array>

#include <omp.h>

#include "core/text.h"
#include "cpu/algorithms/algorithms.h"
#include "cpu/gemm.h"
#include "cpu/row_ops.h"

namespace cutloss {
namespace {

using namespace cpu;

class CpuEngine final : public Engine {
 public:
  CpuEngine() {
    if (!onednn_refusal().empty()) return;
    if (!has_avx512()) forbid_avx512();  // one switch, oneDNN's, for both libraries
  }

  std::string_view name() const override { return "cpu"; }

  std::string description() const override {
    if (const std::string refusal = onednn_refusal(); !refusal.empty()) {
      return "not here: " + refusal;
    }
    return text(describe_onednn(), "; ", describe_openblas(), "; vectors ", vector_target(), "; ",
                omp_get_max_threads(), " threads");
  }

  std::string refusal(const Problem& p) const override {
    return p.device == Device::cpu ? onednn_refusal() : "the tensors are not in host memory";
  }

  std::span<const Algorithm* const> algorithms() const override {
    static const std::array list = {&forward_algorithm(), &by_rows(), &stored(), &by_vocabulary()};
    return list;
  }
};

}  // namespace

const Engine& cpu_engine() {
  static const CpuEngine engine;
  return engine;
}

}  // namespace cutloss
