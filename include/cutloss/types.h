// The small types that every call shares.
#pragma once

#include <cstdint>
#include <string_view>

namespace cutloss {

enum class DType : std::uint8_t { f32, f64, bf16, f16 };
enum class IndexType : std::uint8_t { i32, i64 };
enum class Device : std::uint8_t { cpu, cuda };

// When the upstream gradients of a row's outputs are known.
enum class Upstream : std::uint8_t {
  none,         // no gradient is wanted
  at_forward,   // given to forward_backward, up to one scalar factor (mean and sum reductions)
  at_backward,  // given to backward only (per-token losses, a differentiable lse or entropy)
};

// How the gradients are made (docs/math.md, "Two schedules").
enum class Schedule : std::uint8_t {
  automatic,   // the plan takes the cheapest that fits the workspace
  none,        // forward alone (chosen where no gradient is wanted)
  rows,        // logits of a chunk of rows are kept: three products
  vocabulary,  // logits are recomputed slab by slab: four products, least memory
};

// What a session is opened for.
enum class Pass : std::uint8_t {
  forward,   // statistics
  backward,  // gradients, from the statistics of an earlier call
  both,      // gradients of a chunk follow its statistics
};
constexpr bool makes_statistics(Pass pass) { return pass != Pass::backward; }
constexpr bool makes_gradients(Pass pass) { return pass != Pass::forward; }

std::string_view name(DType type);
std::string_view name(Schedule schedule);

}  // namespace cutloss
