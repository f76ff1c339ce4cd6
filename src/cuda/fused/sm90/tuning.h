// The sizes of Hopper's kernels, with the reasons (docs/kernels.md).
#pragma once

namespace cutloss::cuda::fused::sm90 {

// The tile of a product, which has as many sums as the registers of a group hold, and the depth of
// a stage of its operands.
inline constexpr int kTileRows = 128;
inline constexpr int kTileColumns = 192;
inline constexpr int kTileDepth = 64;

// How many row blocks (of 256 rows) pass down the vocabulary together. 6 to 11 are equally quick,
// and the rows of E of 6 fit into L2 many times over.
inline constexpr int kLargestGroup = 6;

}  // namespace cutloss::cuda::fused::sm90
