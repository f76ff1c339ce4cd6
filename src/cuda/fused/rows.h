// The kernels with which the fused engine works on single rows, between and after its products.
// Entry i of an array of rows belongs to entry `first + i` of the list of rows that count.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/logit_math.h"
#include "cuda/fused/kernels.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda::fused {

// The entries [first, first + rows) of the list.
struct Listed {
  RowTable table;
  int first = 0;
  int rows = 0;
};

// Writes empty partial statistics, and NaN for target logits, which stays where no target is found.
void launch_clear_statistics(const Partials& partials, std::int64_t entries, float* target_logit,
                             int rows, cudaStream_t stream);

// Merges the partial statistics of a slab into the rows' states, and closes the rows after the
// last slab. states may be null where one slab is all.
struct Merge {
  Listed list;
  Partials partials;
  int clusters = 0;       // as the Grid of the statistics has it
  int largest_group = 0;  // as the Grid has it
  bool all = false;
  bool first_slab = true, last_slab = true;
  RowState<float>* states = nullptr;
  const float* target_logit = nullptr;
  const float* class_weight = nullptr;  // the weights of the classes here, or null
  Classes classes;
  RowOutputs out;
};
void launch_merge(const Merge& merge, cudaStream_t stream);

// Makes reference exponents, each the target's logit, an exact fp32 dot product, plus 15. Where the
// target is in another shard a column of this one stands in for it, which differs from row to row.
// Clears *redo.
struct References {
  Listed list;
  Matrix e;  // bf16, rows of this list
  Matrix c;  // bf16
  int depth = 0;
  int columns = 0;
  LogitTransform transform;       // its bias is that of all columns
  float* target_logit = nullptr;  // with a softcap, the number before the transform
  float* reference = nullptr;
  int* redo = nullptr;
};
void launch_references(const References& references, cudaStream_t stream);

// Closes the rows of a chunk whose exponentials are made. A row whose sum left the range in which
// fp32 keeps its digits gets its maximum as reference, and *redo becomes 1.
struct Close {
  Listed list;
  const float2* sum_and_max = nullptr;  // (rows, column tiles)
  int column_tiles = 0;
  const float* target_logit = nullptr;  // this and the next two are those of References
  LogitTransform transform;
  float* reference = nullptr;
  Classes classes;
  RowOutputs out;
  int* redo = nullptr;
  bool again = false;  // the second time, when nothing is done where *redo is 0
};
void launch_close(const Close& close, cudaStream_t stream);

// The inputs of the rows' factors.
struct FactorInputs {
  Listed list;
  RowOutputs rows;
  RowGradients upstream;
  const float* inv_temperature = nullptr;
  float softcap = 0;
  float scale = 1;  // this is logit_scale
};
// What makes g by rows: it is factor * x for all columns but the target's, where it is target_g.
struct RowFactors {
  const float* reference = nullptr;     // as References has it
  const float* target_logit = nullptr;  // as References has it
  float* factor = nullptr;
  float* target_g = nullptr;
};
void launch_row_factors(const FactorInputs& k, const RowFactors& out, cudaStream_t stream);

// Writes factor * E in bf16, and zeros beyond the rows that count.
void launch_scaled_rows(const Listed& list, const Matrix& e, const float* factor, int depth,
                        void* scaled, std::int64_t stride, cudaStream_t stream);

// Stores dE[position] = factor * sums + target_g * C[target].
struct StoreDe {
  Listed list;
  const float* sums = nullptr;  // (rows, depth)
  const float* factor = nullptr;
  const float* target_g = nullptr;
  Matrix c;  // bf16
  int depth = 0;
  void* de = nullptr;
  DType de_type = DType::bf16;
};
void launch_store_de(const StoreDe& store, cudaStream_t stream);

// Adds the column sums of factor * x to dbias, in fp64 and in the order of the rows.
void launch_add_dbias(const Listed& list, const void* x, std::int64_t x_stride, const float* factor,
                      double inverse_scale, int V, double* dbias, bool first, cudaStream_t stream);

// Writes zeros to a matrix (the first chunk's dC) where no row counts at all.
void launch_clear_if_none(const int* count, void* values, std::int64_t bytes, cudaStream_t stream);

// Writes zeros to the rows of a 16-bit matrix that no tile of a logits kernel covered.
void launch_clear_rest(const Listed& list, void* matrix, std::int64_t stride, int columns,
                       int block_rows, cudaStream_t stream);

}  // namespace cutloss::cuda::fused
