// What the fused engine's algorithms decide, beside what cuda/decision.h has.
#pragma once

#include <memory>

#include "cuda/decision.h"
#include "cuda/fused/kernels.h"

namespace cutloss::cuda::fused {

namespace buffer {
using namespace cuda::buffer;
// Partial statistics of a slab.
inline constexpr std::string_view kPartials = "partial sums";
inline constexpr std::string_view kPartialsMore = "partial weighted sums";
inline constexpr std::string_view kPartialsArgmax = "partial argmax";
inline constexpr std::string_view kTargetLogit = "target logits";
inline constexpr std::string_view kReference = "reference exponents";
// Whether a chunk's exponentials are made again.
inline constexpr std::string_view kRedo = "redo";
// Of exponentials: sum and maximum of each row and column tile.
inline constexpr std::string_view kSums = "sums of exponentials";
inline constexpr std::string_view kFactor = "factors";
inline constexpr std::string_view kTargetG = "g of the targets";
inline constexpr std::string_view kTargetOrder = "order of the targets";
inline constexpr std::string_view kTargetSort = "sort of the targets";
inline constexpr std::string_view kTargetSums = "sums of the targets";
inline constexpr std::string_view kSumOfColumn = "sum of each column";
inline constexpr std::string_view kScaledE = "scaled E";
// Kept: exponentials, (chunk rows, padded vocabulary) bf16.
inline constexpr std::string_view kX = "exponentials";
}  // namespace buffer

// The kernels of a device's generation; null where there are none.
const LogitKernels* kernels_of(const DeviceFacts& device);

struct FusedDecision : CudaDecision {
  const LogitKernels* kernels = nullptr;
  // Forward's statistics read packed rows of E, else rows where they lie, found by their positions.
  bool packs_e_in_forward = false;
  // Forward passes over several slabs, since C is converted slab by slab: rows' states live on.
  bool several_slabs = false;
  Grid statistics_grid;
};

// Algorithm::decide of all of them.
std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& problem,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least);

// Of kernels that store what they make of a block of rows.
Grid logits_grid(const FusedDecision& d, std::int64_t rows);

// Why a problem cannot go by rows here; empty where it can.
std::string by_rows_refusal(const Problem& problem, const DeviceFacts& device);

}  // namespace cutloss::cuda::fused
