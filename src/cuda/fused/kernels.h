// What a generation of GPUs offers to the fused engine: a table of kernels, each generation's in a
// folder of its own (sm90/ is Hopper's), and what they are told. All are launched on a stream and
// never synchronise. "Rows" are entries of the list of rows that count; matrices of rows lie in the
// order of that list. Matrices begin, and their rows lie, at multiples of 16 bytes.
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
  float softcap = 0;  // 0: none
  float inv_softcap = 0;
};

// A block of logits: rows of E times a slab of columns.
struct Logits {
  DType type = DType::bf16;  // of E and C: bf16 or f16
  Matrix e;
  // Null: row i of the block is row i of e. Else it is row positions[first + i] of the matrix of
  // `e_rows` rows that e is.
  const int* positions = nullptr;
  std::int64_t e_rows = 0;
  Matrix c;      // the slab's
  int rows = 0;  // at most
  int columns = 0;
  int depth = 0;
  const int* count = nullptr;    // in device memory: the rows that count ...
  int first = 0;                 // ... of which this block's first is number `first`
  LogitTransform transform;      // bias: the slab's
  const int* target = nullptr;   // (rows): a column of all, or a negative number
  int origin = 0;                // the slab's first column
  const int* only_if = nullptr;  // null, or in device memory: 0 means do nothing
};

// Partial statistics: for each row, `slots` sets for each cluster that works on the row's block.
struct Partials {
  float2* max_and_sum = nullptr;
  float2* weighted_and_zbar = nullptr;  // these two where all statistics are wanted
  float2* weight_and_argmax = nullptr;  // class weights seen; the bits of an int
  int block_rows = 0;                   // these two: Grid
  int slots = 0;

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

// How a persistent kernel spreads over the device. Forward's statistics follow it: their merge
// walks the same order.
struct Grid {
  int blocks = 0;
  bool shares_rows = false;  // few rows: the blocks of a cluster have columns of their own
  int width = 0;             // columns of a tile
  int largest_group = 1;     // row blocks whose rows of E stay in L2 together
  int clusters() const { return blocks / 2; }
  int block_rows() const { return shares_rows ? 128 : 256; }
  int slots() const { return shares_rows ? 4 : 2; }
};

// Entries of each array of Partials for `rows` rows, however many of them count.
std::int64_t partial_entries(const Grid& grid, int rows);

struct Statistics {
  Partials partials;
  float* target_logit = nullptr;        // (rows): written where the target is in the slab
  const float* class_weight = nullptr;  // the slab's, or null: all ones
  bool all = false;                     // entropy, zbar and argmax too
};

struct GradientOfLogits {
  void* g = nullptr;  // (rows, columns) in the logits' type
  std::int64_t g_stride = 0;
  const cuda::RowGradient<float>* row = nullptr;
  const float* class_weight = nullptr;
  bool general = false;  // entropy or zbar: g is more than p times a function of the row
};

struct Exponentials {
  void* x = nullptr;  // (rows, columns) bf16: e^(z - reference) times the softcap's slope
  std::int64_t x_stride = 0;
  const float* reference = nullptr;  // (rows)
  float2* sum_and_max = nullptr;     // (rows, column tiles)
};

// dC (+)= scale * g^T * E: g is (rows, V), E is (rows, D), both bf16. Where no row counts, dC is
// left as it is.
struct DcProduct {
  Matrix g;
  Matrix e;
  void* dc = nullptr;          // (V, D)
  DType dc_type = DType::f32;  // or bf16
  // As in Logits: E where its rows lie, among `e_rows`.
  const int* positions = nullptr;
  std::int64_t e_rows = 0;
  int rows = 0;  // at most
  int V = 0;
  int D = 0;
  const int* count = nullptr;  // as in Logits
  int first = 0;
  bool add = false;  // f32 only
  float scale = 1;
  // Null, or sums to be added too: to row v of dC row sum_of_column[v] of `sums`, where not -1.
  const int* sum_of_column = nullptr;
  const float* sums = nullptr;  // (.., D)
};

// sums (+)= scale * g * C: g is (rows, columns), C is (columns, D), both bf16, and the sums (rows,
// D) are fp32. Rows of tiles that hold none which counts are left as they are.
struct DeProduct {
  Matrix g;
  Matrix c;
  float* sums = nullptr;
  int rows = 0;  // at most
  int columns = 0;
  int D = 0;
  const int* count = nullptr;  // as in Logits
  int first = 0;
  bool add = false;
  float scale = 1;
};

struct LogitKernels {
  // Of a tile; Exponentials have a sum for each row and tile.
  std::int64_t tile_columns;
  // At most `rows` rows and `columns` columns. Only forward's statistics may share rows.
  Grid (*grid)(int multiprocessors, int rows, int columns, bool may_share_rows);
  void (*statistics)(const Logits& logits, const Statistics& statistics, const Grid& grid,
                     cudaStream_t stream);
  void (*gradient)(const Logits& logits, const GradientOfLogits& gradient, const Grid& grid,
                   cudaStream_t stream);
  void (*exponentials)(const Logits& logits, const Exponentials& exponentials, const Grid& grid,
                       cudaStream_t stream);
  void (*dc)(const DcProduct& product, const Grid& grid, cudaStream_t stream);
  void (*de)(const DeProduct& product, const Grid& grid, cudaStream_t stream);
  // Both of one g, whose rows of E lie in the order of the list.
  void (*dc_and_de)(const DcProduct& dc, const DeProduct& de, const Grid& grid,
                    cudaStream_t stream);
  // What that takes, in products whose tiles leave no multiprocessor idle.
  double (*dc_and_de_time)(int multiprocessors, std::int64_t rows, std::int64_t columns,
                           std::int64_t D);
};

namespace sm90 {
extern const LogitKernels kernels;
}  // namespace sm90

}  // namespace cutloss::cuda::fused
