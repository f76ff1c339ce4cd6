// The statistics that the fused engine makes in its products' kernels.
#pragma once

#include "cuda/fused/components.h"

namespace cutloss::cuda::fused {

// Makes the statistics of a chunk: no logit leaves the registers of the product's kernel. Each
// cluster of blocks makes partial sums of its rows and columns, which a second kernel merges; where
// C is converted slab by slab, they are made so, and the rows' states live from one slab to the
// next.
void make_statistics(Components& parts, RowRange chunk);

}  // namespace cutloss::cuda::fused
