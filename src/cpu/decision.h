// What the CPU engine's algorithms decide: sizes, and what lies where in the memory of a call.
#pragma once

#include <cstdint>
#include <memory>

#include "plan/algorithm.h"
#include "plan/buffers.h"

namespace cutloss::cpu {

// The dtype of the products' operands on a machine for a problem.
DType product_type(const Problem& problem, const DeviceFacts& device);

namespace buffer {
using namespace cutloss::buffer;
// int64: how many rows count, then which.
inline constexpr std::string_view kRowList = "row list";
// E of a block, gathered and converted.
inline constexpr std::string_view kE = "E of a block";
// C of a slab, converted.
inline constexpr std::string_view kC = "C of a slab";
// What is kept lies slab after slab, each a packed (chunk rows, slab columns) matrix; of the
// chunk's first rows it may lie elsewhere.
inline constexpr std::string_view kKeptInDc = "kept logits of the first rows";
// The maxima of kept exponentials, (chunk rows, slabs).
inline constexpr std::string_view kMaxima = "slab maxima";
}  // namespace buffer

struct CpuDecision : Decision {
  // A slab of dC is written when the slab's kept logits have been read for the last time, so where
  // one chunk holds every row, a slab's first rows wait in that slab of dC: memory that must exist
  // anyway (decision 0002). So many rows do.
  std::int64_t rows_in_dc = 0;
  // g has a place of its own, or takes that of the logits that it is made of.
  bool g_in_logits = false;

  std::int64_t slab_count() const { return divide_up(classes_of(problem).count, sizes.slab); }
};

// Algorithm::decide of all of them.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& problem,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least);

}  // namespace cutloss::cpu
