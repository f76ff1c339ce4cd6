// What the CPU engine's algorithms decide: sizes, and what lies where in the memory of a call.
#pragma once

#include <cstdint>
#include <memory>

#include "plan/algorithm.h"
#include "plan/buffers.h"

namespace cutloss::cpu {

// The dtype of the products' operands for a problem on a machine.
DType product_type(const Problem& problem, const DeviceFacts& device);

namespace buffer {
using namespace cutloss::buffer;
// How many rows count, then which, as int64.
inline constexpr std::string_view kRowList = "row list";
// The rows of E of a block, gathered and converted.
inline constexpr std::string_view kE = "E of a block";
// The rows of C of a slab, converted.
inline constexpr std::string_view kC = "C of a slab";
// What is kept lies slab after slab, each a packed (chunk rows, slab columns) matrix. That of the
// chunk's first rows may lie in dC.
inline constexpr std::string_view kKeptInDc = "kept logits of the first rows";
// The maxima of kept exponentials, (chunk rows, slabs).
inline constexpr std::string_view kMaxima = "slab maxima";
}  // namespace buffer

struct CpuDecision : Decision {
  // How many of a slab's first rows wait in that slab of dC, which is memory that must exist anyway
  // (decision 0002): a slab of dC is written when the slab's kept logits have been read for the
  // last time. It needs one chunk that holds every row.
  std::int64_t rows_in_dc = 0;
  // g takes the place of the logits that it is made of, or has its own.
  bool g_in_logits = false;

  std::int64_t slab_count() const { return divide_up(classes_of(problem).count, sizes.slab); }
};

// Algorithm::decide of all algorithms of the engine.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& problem,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least);

}  // namespace cutloss::cpu
