// The row kernels of the CUDA engines: each function launches a kernel on a stream and returns. T
// is the stat dtype, float or double. "Entries" are those of the row table, and matrices of rows
// lie in its order. No kernel uses atomics: every sum has a fixed order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/row_map.h"
#include "core/row_state.h"
#include "cuda/cublaslt.h"
#include "cuda/rows/row_table.h"
#include "cutloss/cutloss.h"

namespace cutloss::cuda {

// --- rows.cu ----------------------------------------------------------------------------------

// What a kernel must know to find the rows among the positions, and which of them count.
struct RowFacts {
  const void* targets = nullptr;
  IndexType target_type = IndexType::i64;
  std::int64_t ignore_index = 0;
  int rows = 0;
  RowMap<int> map;
  int V = 0;                    // the number of classes of the whole vocabulary
  Classes classes;              // the classes that are columns here
  std::int64_t num_valid = -1;  // -1 where it is not given
  bool compact = true;          // the list has no gaps; without it entry n is row n or nothing
  const void* temperature = nullptr;  // (rows) in the stat dtype, or null
  double temperature_scale = 1;
  double least = 0, most = 0;  // the range of usable temperatures
};

template <class T>
void list_rows(const RowFacts& facts, const RowTable& table, cudaStream_t stream);

// Writes zeros to the per-row outputs of ignored rows, or NaN to those of all rows where num_valid
// is wrong.
template <class T>
void clear_ignored(const RowFacts& facts, const RowTable& table, const RowOutputs& out,
                   cudaStream_t stream);

// Closes the entries [first, first + count), whose states begin at `states`. `class_weight` is that
// of the classes here, or null.
template <class T>
void finish_rows(const RowTable& table, std::int64_t first, std::int64_t count,
                 const RowState<T>* states, const T* class_weight, const RowOutputs& out,
                 const Classes& classes, cudaStream_t stream);

// The inputs of a chunk's coefficients.
struct Coefficients {
  RowTable table;
  std::int64_t first = 0, count = 0;  // entries
  RowOutputs rows;
  RowGradients upstream;
  const void* class_weight = nullptr;  // the weights of the classes here, or null
  Classes classes;
};

// Writes the scale of g, a power of two that brings the largest possible |g| to at most 2^13, and
// logit_scale divided by it.
void make_scalars(const Coefficients& coefficients, double logit_scale, DeviceScalars* scalars,
                  cudaStream_t stream);
template <class T>
void make_coefficients(const Coefficients& coefficients, const DeviceScalars* scalars,
                       RowGradient<T>* rows, cudaStream_t stream);

// --- matrix.cu --------------------------------------------------------------------------------

// A copy of rows, which are converted, and may be gathered or scattered by the table.
struct RowCopy {
  const void* from = nullptr;
  DType from_type = DType::f32;
  std::int64_t from_stride = 0;
  void* to = nullptr;
  DType to_type = DType::f32;
  std::int64_t to_stride = 0;
  std::int64_t rows = 0, columns = 0;
};
// What finds an entry's row of E.
struct Places {
  RowTable table;
  std::int64_t first = 0;  // entry
  int length = 0;
  std::int64_t sequence_stride = 0, row_stride = 0;
};
void copy_rows(const RowCopy& copy, cudaStream_t stream);
// Gathers rows of E, which is `from`. Entries without a row become zeros.
void gather_rows(const RowCopy& copy, const Places& places, cudaStream_t stream);
// Scatters rows to packed positions, which are `to`. Entries without a row are skipped.
void scatter_rows(const RowCopy& copy, const Places& places, cudaStream_t stream);

// Writes zeros to the rows of dE that predict nothing, or an ignored target.
void clear_unpredicted(const RowFacts& facts, std::int64_t positions, void* de, DType type,
                       std::int64_t D, cudaStream_t stream);

// Adds from[i], which may have another dtype, to to[i] in fp64.
void add_flat(const void* from, DType from_type, double* to, std::int64_t count,
              cudaStream_t stream);

// Sums the columns of a row-major matrix.
struct ColumnSums {
  const void* g = nullptr;
  std::int64_t stride = 0;
  DType type = DType::f32;
  std::int64_t rows = 0, columns = 0;
  double* sums = nullptr;
  bool accumulate = false;
  const DeviceScalars* scalars =
      nullptr;  // null, or the inv_scale that the sums are multiplied with
};
void column_sums(const ColumnSums& s, cudaStream_t stream);

// Writes NaN throughout, where the table says that num_valid is wrong.
void poison_where_wrong(const RowTable& table, void* values, DType type, std::int64_t count,
                        cudaStream_t stream);

}  // namespace cutloss::cuda
