// The names of the buffers that every engine has. Matrices are row-major.
#pragma once

#include <string_view>

#include "plan/decision.h"

namespace cutloss::buffer {

// RowState of the chunk's rows.
inline constexpr std::string_view kStates = "states";
// In the stat dtype.
inline constexpr std::string_view kBias = "bias";
// Logits of a block.
inline constexpr std::string_view kZ = "logits";
inline constexpr std::string_view kG = "g";
// dE of the chunk, dC of a slab or of the vocabulary, in the stat dtype; dbias in fp64.
inline constexpr std::string_view kDeSums = kDeSumsName;
inline constexpr std::string_view kDcSums = "dC's sums";
inline constexpr std::string_view kDbiasSums = "dbias's sums";
// Kept: logits or exponentials.
inline constexpr std::string_view kKept = "kept logits";

}  // namespace cutloss::buffer
