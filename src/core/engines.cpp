// The list of engines: one line for each, in the order in which a plan asks them.
#include <array>

#include "core/engine.h"
#include "core/text.h"
#include "cpu/cpu_engine.h"
#ifdef CUTLOSS_CUDA_SM90
#include "cuda/fused_sm90_engine.h"
#endif
#ifdef CUTLOSS_CUDA
#include "cuda/library_engine.h"
#endif

namespace cutloss {

std::span<const Engine* const> engines() {
  static const std::array list = {
#ifdef CUTLOSS_CUDA_SM90
      &cuda_fused_sm90_engine(),
#endif
#ifdef CUTLOSS_CUDA
      &cuda_library_engine(),
#endif
      &cpu_engine(),
  };
  return list;
}

const Engine& engine_named(std::string_view name) {
  std::string known;
  for (const Engine* engine : engines()) {
    if (engine->name() == name) return *engine;
    known += text(known.empty() ? "" : ", ", engine->name());
  }
  throw Error(ErrorCode::invalid_value,
              text("there is no engine '", name, "' in this build; it has ", known));
}

}  // namespace cutloss
