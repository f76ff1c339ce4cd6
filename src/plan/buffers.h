// The names of the buffers that every engine has. Matrices are row-major.
#pragma once

#include <string_view>

namespace cutloss::buffer {

// A RowState for each row of the chunk.
inline constexpr std::string_view kStates = "states";
// The bias in the stat dtype.
inline constexpr std::string_view kBias = "bias";
// The logits of a block, and its g.
inline constexpr std::string_view kZ = "logits";
inline constexpr std::string_view kG = "g";
// The sums of the chunk's dE and of dC of a slab or of the vocabulary, in the stat dtype, and those
// of dbias in fp64.
inline constexpr std::string_view kDeSums = "dE's sums";
inline constexpr std::string_view kDcSums = "dC's sums";
inline constexpr std::string_view kDbiasSums = "dbias's sums";
// The logits or exponentials that are kept.
inline constexpr std::string_view kKept = "kept logits";

}  // namespace cutloss::buffer
