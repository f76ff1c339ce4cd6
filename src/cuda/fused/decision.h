// What the fused engine's algorithms decide beside what cuda/decision.h has.
#pragma once

#include <memory>

#include "cuda/decision.h"
#include "cuda/fused/kernels.h"

namespace cutloss::cuda::fused {

namespace buffer {
using namespace cuda::buffer;
// The partial statistics of a slab.
inline constexpr std::string_view kPartials = "partial sums";
inline constexpr std::string_view kPartialsMore = "partial weighted sums";
inline constexpr std::string_view kPartialsArgmax = "partial argmax";
inline constexpr std::string_view kTargetLogit = "target logits";
inline constexpr std::string_view kReference = "reference exponents";
// Whether a chunk's exponentials are made again.
inline constexpr std::string_view kRedo = "redo";
// The sum and the maximum of exponentials in each row and column tile.
inline constexpr std::string_view kSums = "sums of exponentials";
inline constexpr std::string_view kFactor = "factors";
inline constexpr std::string_view kTargetG = "g of the targets";
inline constexpr std::string_view kTargetOrder = "order of the targets";
inline constexpr std::string_view kTargetSort = "sort of the targets";
inline constexpr std::string_view kTargetSums = "sums of the targets";
inline constexpr std::string_view kSumOfColumn = "sum of each column";
inline constexpr std::string_view kScaledE = "scaled E";
// The exponentials that are kept, (chunk rows, padded vocabulary) in bf16.
inline constexpr std::string_view kX = "exponentials";
}  // namespace buffer

// The kernels for a device's generation; null where there are none.
const LogitKernels* kernels_of(const DeviceFacts& device);

struct FusedDecision : CudaDecision {
  const LogitKernels* kernels = nullptr;
  // dE's product is the engine's own, and else the matrix library's.
  bool makes_de_itself = false;
  // Forward's statistics read packed rows of E. Without it they read rows where these lie, which
  // they find by their positions.
  bool packs_e_in_forward = false;
  // Forward passes over several slabs, since C is converted slab by slab. The rows' states then
  // live from one slab to the next.
  bool several_slabs = false;
  Grid statistics_grid;
};

// Algorithm::decide of all algorithms of the engine.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& problem,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least);

// The grid of kernels that store what they make of a block of rows.
Grid logits_grid(const FusedDecision& d, std::int64_t rows);

// Says why a problem cannot be computed by rows here, or nothing where it can.
std::string by_rows_refusal(const Problem& problem, const DeviceFacts& device);

}  // namespace cutloss::cuda::fused
