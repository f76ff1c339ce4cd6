// The engine for processors: oneDNN's and OpenBLAS's products, and our own row work.
#include "cpu/engine.h"

#include <array>

#include <omp.h>

#include "core/text.h"
#include "cpu/gemm/gemm.h"
#include "cpu/rows/row_ops.h"
#include "cpu/tuning.h"

namespace cutloss {
namespace {

DeviceFacts this_processor() {
  DeviceFacts facts;
  facts.absent = cpu::onednn_refusal();
  if (!facts.absent.empty()) return facts;
  if (!cpu::has_avx512()) cpu::forbid_avx512();  // oneDNN's switch is for both libraries
  facts.native_bf16 = cpu::has_native_bf16();
  return facts;
}

const DeviceFacts& device() {
  static const DeviceFacts facts = this_processor();
  return facts;
}

std::string description() {
  return text(cpu::describe_onednn(), "; ", cpu::describe_openblas(), "; vectors ",
              cpu::vector_target(), "; ", omp_get_max_threads(), " threads");
}

std::string refusal(const Problem& p, const DeviceFacts& /*device*/) {
  return p.device == Device::cpu ? "" : "the tensors are not in host memory";
}

constexpr std::array kAlgorithms = {&cpu::forward_algorithm, &cpu::by_rows, &cpu::stored,
                                    &cpu::by_vocabulary};

}  // namespace

constinit const Engine cpu_engine{"cpu", device, description, refusal, kAlgorithms, cpu::tuning};

}  // namespace cutloss
