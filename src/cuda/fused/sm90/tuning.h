// The sizes of Hopper's kernels, and why (docs/kernels.md).
#pragma once

namespace cutloss::cuda::fused::sm90 {

// A tile of a product, and how deep a stage of its operands is: as many sums as the registers of a
// group hold.
inline constexpr int kTileRows = 128;
inline constexpr int kTileColumns = 192;
inline constexpr int kTileDepth = 64;

// Row blocks (of 256 rows) that pass down the vocabulary together: 6 to 11 are alike, and of 6 the
// rows of E fit in L2 many times over.
inline constexpr int kLargestGroup = 6;

}  // namespace cutloss::cuda::fused::sm90
