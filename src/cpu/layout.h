// Where everything lies in the memory of a call: one function says both how many bytes a plan
// takes and where its parts find their buffers.
#pragma once

#include <cstdint>

#include "core/engine.h"

namespace cutloss::cpu {

// The dtype of the products' operands on this machine for a problem.
DType product_type(const Problem& problem);

// What is kept of a chunk's logits: e^(z - slab maximum) in the products' dtype, or z in the stat
// dtype where g needs z itself.
bool keeps_exponentials(const Problem& problem);
DType kept_type(const Problem& problem);

// Whether gradients accumulate in their output: it has the accumulators' dtype.
bool accumulates_in_place(DType gradient_type, const Problem& problem);

// Byte offsets; -1 where a plan does not need the buffer.
struct WorkspaceLayout {
  std::int64_t row_list = -1;    // int64: how many rows count, then which
  std::int64_t states = -1;      // RowState of the chunk's rows
  std::int64_t e_block = -1;     // E of a block, gathered and converted
  std::int64_t c_slab = -1;      // C of a slab, converted
  std::int64_t bias = -1;        // bias in the stat dtype
  std::int64_t z = -1;           // logits of a block
  std::int64_t g = -1;           // g of a block
  std::int64_t de_sums = -1;     // dE of a chunk
  std::int64_t dc_sums = -1;     // dC of a slab, or of the whole vocabulary
  std::int64_t dbias_sums = -1;  // fp64
  std::int64_t bytes = 0;
};
WorkspaceLayout workspace_layout(const Plan& plan, Passes passes);

// Kept logits lie slab after slab, each a packed (chunk rows, slab columns) matrix. A slab of dC
// is written when the slab's kept logits have been read for the last time, so where one chunk
// holds every row, a slab's first rows wait in that slab of dC: memory that must exist anyway.
struct KeptLayout {
  std::int64_t rows_in_dc = 0;  // the first rows of the chunk; the others lie at `logits`
  std::int64_t logits = 0;
  std::int64_t slab_maxima = -1;  // (chunk rows, slabs), with exponentials only
  std::int64_t bytes = 0;
};
KeptLayout kept_layout(const Plan& plan);

std::int64_t slab_count(const Plan& plan);

}  // namespace cutloss::cpu
