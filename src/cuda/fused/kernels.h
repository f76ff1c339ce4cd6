// What a generation of GPUs offers to the fused engine: a table of kernels, and the structs that
// are passed to them. Each generation has a folder of its own (sm90/ is Hopper's). All kernels are
// launched on a stream and never synchronise. "Rows" are entries of the list of rows that count;
// matrices of rows lie in the order of that list. Matrices begin, and their rows lie, at multiples
// of 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/matrix.h"
#include "cuda/fused/tile_walk.h"
#include "cuda/rows/row_table.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda::fused {

// z = capped(scale * sum + bias) * inv_temperature[row]
struct LogitTransform {
  const float* bias = nullptr;             // (columns), or null
  const float* inv_temperature = nullptr;  // (rows)
  float scale = 1;
  float softcap = 0;  // 0 where there is none
  float inv_softcap = 0;
};

// A block of logits: rows of E times a slab of columns.
struct Logits {
  DType type = DType::bf16;  // the dtype of E and C: bf16 or f16
  Matrix e;
  // Where it is null, row i of the block is row i of e. Else it is row positions[first + i] of e,
  // which then has `e_rows` rows.
  const int* positions = nullptr;
  std::int64_t e_rows = 0;
  Matrix c;      // the slab's rows of C
  int rows = 0;  // an upper bound: the block has those that count
  int columns = 0;
  int depth = 0;
  const int* count = nullptr;   // how many rows count, in device memory
  int first = 0;                // the number of the block's first row among them
  LogitTransform transform;     // its bias is the slab's
  const int* target = nullptr;  // (rows), columns of the whole vocabulary, or negative numbers
  int origin = 0;               // the slab's first column
  const int* only_if =
      nullptr;  // null, or a number in device memory: nothing is done where it is 0
};

// Partial statistics. Each row has `slots` sets for each cluster that works on the row's block.
struct Partials {
  float2* max_and_sum = nullptr;
  float2* weighted_and_zbar = nullptr;  // needed where all statistics are wanted
  float2* weight_and_argmax = nullptr;  // needed there, too: class weights seen; the bits of an int
  int block_rows = 0;                   // as the Grid has it
  int slots = 0;                        // as the Grid has it

#ifdef __CUDACC__
  __device__ std::int64_t index(const TileWalk& walk, int run, std::int64_t slot, int row) const {
    std::int64_t offset = 0;
    for (int r = 0; r < run; ++r) {
      offset += std::int64_t{walk.run[r + 1].first_block - walk.run[r].first_block} * block_rows *
                slots * walk.sharers(r);
    }
    const int end = run + 1 < walk.runs ? walk.run[run + 1].first_block : walk.row_blocks;
    const std::int64_t rows_of_run = std::int64_t{end - walk.run[run].first_block} * block_rows;
    return offset + slot * rows_of_run + (row - walk.run[run].first_block * block_rows);
  }
#endif
};

// How a persistent kernel spreads over the device. The merge of forward's statistics walks the same
// order as the kernel.
struct Grid {
  int blocks = 0;
  bool shares_rows =
      false;              // the blocks of a cluster have columns of their own, since rows are few
  int width = 0;          // how many columns a tile has
  int largest_group = 1;  // how many row blocks' rows of E stay in L2 together
  int clusters() const { return blocks / 2; }
  int block_rows() const { return shares_rows ? 128 : 256; }
  int slots() const { return shares_rows ? 4 : 2; }
};

// The number of entries that each array of Partials needs for `rows` rows, however many of them
// count.
std::int64_t partial_entries(const Grid& grid, int rows);

struct Statistics {
  Partials partials;
  float* target_logit = nullptr;        // (rows), written where the target is in the slab
  const float* class_weight = nullptr;  // the weights of the slab's columns, or null for ones
  bool all = false;                     // entropy, zbar and argmax are wanted, too
};

struct GradientOfLogits {
  void* g = nullptr;  // (rows, columns) in the logits' type
  std::int64_t g_stride = 0;
  const cuda::RowGradient<float>* row = nullptr;
  const float* class_weight = nullptr;
  bool general = false;  // with entropy or zbar g is more than p times a function of the row
};

struct Exponentials {
  void* x = nullptr;  // (rows, columns), bf16, e^(z - reference) times the softcap's slope
  std::int64_t x_stride = 0;
  const float* reference = nullptr;  // (rows)
  float2* sum_and_max = nullptr;     // (rows, column tiles)
};

// The product dC (+)= scale * g^T * E, where g is (rows, V) and E (rows, D), both in bf16. Where no
// row counts, dC is left as it is.
struct DcProduct {
  Matrix g;
  Matrix e;
  void* dc = nullptr;          // (V, D)
  DType dc_type = DType::f32;  // f32 or bf16
  // As in Logits, these say that rows of E are read where they lie.
  const int* positions = nullptr;
  std::int64_t e_rows = 0;
  int rows = 0;  // an upper bound, as in Logits
  int V = 0;
  int D = 0;
  const int* count = nullptr;  // as in Logits
  int first = 0;
  bool add = false;  // possible with f32 alone
  float scale = 1;
  // Null, or which sums are added, too: row sum_of_column[v] of `sums`, where it is not -1, to row
  // v of dC.
  const int* sum_of_column = nullptr;
  const float* sums = nullptr;  // (.., D)
};

// The product sums (+)= scale * g * C, where g is (rows, columns) and C (columns, D), both in bf16,
// and the sums (rows, D) are fp32. Tiles that hold no row which counts are left as they are.
struct DeProduct {
  Matrix g;
  Matrix c;
  float* sums = nullptr;
  int rows = 0;  // an upper bound, as in Logits
  int columns = 0;
  int D = 0;
  const int* count = nullptr;  // as in Logits
  int first = 0;
  bool add = false;
  float scale = 1;
};

struct LogitKernels {
  // How many columns a tile has. Exponentials have a sum for each row and tile.
  std::int64_t tile_columns;
  // The grid for at most `rows` rows and `columns` columns. Only forward's statistics may share
  // rows.
  Grid (*grid)(int multiprocessors, int rows, int columns, bool may_share_rows);
  void (*statistics)(const Logits& logits, const Statistics& statistics, const Grid& grid,
                     cudaStream_t stream);
  void (*gradient)(const Logits& logits, const GradientOfLogits& gradient, const Grid& grid,
                   cudaStream_t stream);
  void (*exponentials)(const Logits& logits, const Exponentials& exponentials, const Grid& grid,
                       cudaStream_t stream);
  void (*dc)(const DcProduct& product, const Grid& grid, cudaStream_t stream);
  void (*de)(const DeProduct& product, const Grid& grid, cudaStream_t stream);
  // Makes both products of one g, where rows of E lie in the order of the list.
  void (*dc_and_de)(const DcProduct& dc, const DeProduct& de, const Grid& grid,
                    cudaStream_t stream);
  // The time that dc_and_de takes, in products whose tiles leave no multiprocessor idle.
  double (*dc_and_de_time)(int multiprocessors, std::int64_t rows, std::int64_t columns,
                           std::int64_t D);
};

namespace sm90 {
extern const LogitKernels kernels;
}  // namespace sm90

}  // namespace cutloss::cuda::fused
