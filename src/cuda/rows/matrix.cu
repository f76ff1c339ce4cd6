// Kernels on whole matrices: they copy, convert, gather and scatter rows, write zeros and NaNs,
// scale, and sum columns.
#include "core/dtype.h"
#include "cuda/device_calls.h"
#include "cuda/math.cuh"
#include "cuda/rows/kernels.h"
#include "cuda/rows/row_facts.cuh"

namespace cutloss::cuda {
namespace {

constexpr int kCopyThreads = 128;
constexpr int kCopyVector = 8;

enum class Way { straight, gather, scatter };

template <class From, class To>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return narrow<To>(widen<float>(value));
  }
}

// A block copies a row.
template <class From, class To, bool kVectors>
__global__ void __launch_bounds__(kCopyThreads, 4) copy_kernel(RowCopy c, Places places, Way way) {
  const std::int64_t i = blockIdx.x;
  std::int64_t from_offset = i * c.from_stride, to_offset = i * c.to_stride;
  bool empty = false;
  if (way != Way::straight) {
    empty = places.table.row[places.first + i] < 0;
    const int position = places.table.position[places.first + i];
    if (way == Way::scatter) {
      if (empty) return;
      to_offset = position * c.to_stride;
    } else if (!empty) {
      from_offset = (position / places.length) * places.sequence_stride +
                    (position % places.length) * places.row_stride;
    }
  }
  const From* from = static_cast<const From*>(c.from) + from_offset;
  To* to = static_cast<To*>(c.to) + to_offset;
  std::int64_t done = 0;
  if constexpr (kVectors) {
    done = c.columns / kCopyVector * kCopyVector;
    for (std::int64_t d = threadIdx.x * kCopyVector; d < done; d += kCopyThreads * kCopyVector) {
      Pack<From, kCopyVector> in{};
      if (!empty) in = *reinterpret_cast<const Pack<From, kCopyVector>*>(from + d);
      Pack<To, kCopyVector> out;
#pragma unroll
      for (int k = 0; k < kCopyVector; ++k) out.value[k] = convert<From, To>(in.value[k]);
      *reinterpret_cast<Pack<To, kCopyVector>*>(to + d) = out;
    }
  }
  for (std::int64_t d = done + threadIdx.x; d < c.columns; d += kCopyThreads) {
    to[d] = empty ? narrow<To>(0.0f) : convert<From, To>(from[d]);
  }
}

bool even(const void* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % kCopyVector == 0;
}

void copy(const RowCopy& c, const Places& places, Way way, cudaStream_t stream) {
  bool vectors = even(c.from, c.from_stride) && even(c.to, c.to_stride);
  if (way == Way::gather) {
    vectors = vectors && places.sequence_stride % kCopyVector == 0 &&
              places.row_stride % kCopyVector == 0;
  }
  for_type(c.from_type, [&]<class From>(From*) {
    for_type(c.to_type, [&]<class To>(To*) {
      if constexpr (std::is_same_v<From, double> == std::is_same_v<To, double>) {
        launch(vectors ? copy_kernel<From, To, true> : copy_kernel<From, To, false>, "copy_rows",
               c.rows, kCopyThreads, stream, c, places, way);
      } else if constexpr (std::is_same_v<From, double>) {  // sums of dbias
        launch(copy_kernel<From, To, false>, "copy_rows", c.rows, kCopyThreads, stream, c, places,
               way);
      } else {
        throw Error(ErrorCode::internal,
                    text("conversion from ", name(c.from_type), " to ", name(c.to_type)));
      }
    });
  });
}

template <class E>
__global__ void __launch_bounds__(kCopyThreads)
    clear_unpredicted_kernel(RowFacts f, E* de, std::int64_t D) {
  const std::int64_t position = blockIdx.x;
  const int column = static_cast<int>(position % f.map.length);
  if (column < f.map.predicted) {
    if (target_at(f, position) != f.ignore_index) return;
  }
  for (std::int64_t d = threadIdx.x; d < D; d += kCopyThreads) {
    de[position * D + d] = narrow<E>(0.0f);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    poison_kernel(RowTable table, E* values, std::int64_t count) {
  if (*table.mismatch == 0) return;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    values[i] = narrow<E>(not_a_number<float>());
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    add_flat_kernel(const E* from, double* to, std::int64_t count) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    to[i] += widen<double>(from[i]);
  }
}

template <class E, class F>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(E* values, std::int64_t count, const F* factor) {
  using T =
      std::conditional_t<std::is_same_v<E, double> || std::is_same_v<F, double>, double, float>;
  constexpr int kVector = 16 / sizeof(E);
  using Vector = Pack<E, kVector>;
  const T by = widen<T>(*factor);
  if (by == T(1)) return;
  // Values up to the first multiple of 16 bytes and those at the end are taken singly, others in
  // vectors.
  const auto address = reinterpret_cast<std::uintptr_t>(values);
  std::int64_t head = static_cast<std::int64_t>((16 - address % 16) % 16 / sizeof(E));
  if (head > count) head = count;
  const std::int64_t vectors = (count - head) / kVector;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  auto* packed = reinterpret_cast<Vector*>(values + head);
  for (std::int64_t i = thread; i < vectors; i += threads) {
    Vector vector = packed[i];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      vector.value[k] = narrow<E>(widen<T>(vector.value[k]) * by);
    }
    packed[i] = vector;
  }
  const std::int64_t tail = head + vectors * kVector;
  for (std::int64_t i = thread; i < head + count - tail; i += threads) {
    E& value = values[i < head ? i : tail + i - head];
    value = narrow<E>(widen<T>(value) * by);
  }
}

// The number of blocks of a kernel that loops over its values: enough for any GPU.
std::int64_t blocks_for(std::int64_t values) {
  constexpr std::int64_t kMost = 4096;
  const std::int64_t blocks = divide_up(values, kThreads);
  return blocks < kMost ? blocks : kMost;
}

// How many threads of column_sums take a row. Strips are narrow, so that a slab has work for a
// whole device.
constexpr int kStripLanes = 8;

// Eight threads sum a strip of columns over every 32nd row, and those sums are joined in order. A
// few rows at a time are summed in fp32, those sums in fp64: where all rows are alike, a long sum
// in fp32 would lose digits that no product loses.
template <class G>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(ColumnSums s) {
  constexpr int kVector = 16 / sizeof(G);
  constexpr int kFewRows = 32;
  using Sum = std::conditional_t<std::is_same_v<G, double>, double, float>;
  using Vector = Pack<G, kVector>;
  constexpr int kRowsAtOnce = kThreads / kStripLanes;
  constexpr int kColumns = kStripLanes * kVector;
  __shared__ double sums[kRowsAtOnce][kColumns];
  const int lane = threadIdx.x % kStripLanes, own = threadIdx.x / kStripLanes;
  const std::int64_t first = std::int64_t{blockIdx.x} * kColumns;
  const std::int64_t column = first + lane * kVector;
  double total[kVector] = {};
  if (column < s.columns) {
    const G* g = static_cast<const G*>(s.g) + column;
    for (std::int64_t begin = own; begin < s.rows; begin += kRowsAtOnce * kFewRows) {
      Sum few[kVector] = {};
      const std::int64_t end =
          begin + kRowsAtOnce * kFewRows < s.rows ? begin + kRowsAtOnce * kFewRows : s.rows;
#pragma unroll 8
      for (std::int64_t r = begin; r < end; r += kRowsAtOnce) {
        const Vector vector = *reinterpret_cast<const Vector*>(g + r * s.stride);
#pragma unroll
        for (int i = 0; i < kVector; ++i) few[i] += widen<Sum>(vector.value[i]);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] += static_cast<double>(few[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[own][lane * kVector + i] = total[i];
  __syncthreads();
  const double unscale = s.scalars != nullptr ? static_cast<double>(s.scalars->inv_scale) : 1.0;
  for (int i = threadIdx.x; i < kColumns; i += kThreads) {
    if (first + i >= s.columns) continue;
    double sum = 0;
    for (int w = 0; w < kRowsAtOnce; ++w) sum += sums[w][i];
    sum *= unscale;
    s.sums[first + i] = s.accumulate ? s.sums[first + i] + sum : sum;
  }
}

}  // namespace

void copy_rows(const RowCopy& c, cudaStream_t stream) { copy(c, {}, Way::straight, stream); }
void gather_rows(const RowCopy& c, const Places& places, cudaStream_t stream) {
  copy(c, places, Way::gather, stream);
}
void scatter_rows(const RowCopy& c, const Places& places, cudaStream_t stream) {
  copy(c, places, Way::scatter, stream);
}

void clear_unpredicted(const RowFacts& facts, std::int64_t positions, void* de, DType type,
                       std::int64_t D, cudaStream_t stream) {
  for_type(type, [&]<class E>(E*) {
    launch(clear_unpredicted_kernel<E>, "clear_unpredicted", positions, kCopyThreads, stream, facts,
           static_cast<E*>(de), D);
  });
}

void add_flat(const void* from, DType from_type, double* to, std::int64_t count,
              cudaStream_t stream) {
  for_type(from_type, [&]<class E>(E*) {
    launch(add_flat_kernel<E>, "add_flat", blocks_for(count), kThreads, stream,
           static_cast<const E*>(from), to, count);
  });
}

void poison_where_wrong(const RowTable& table, void* values, DType type, std::int64_t count,
                        cudaStream_t stream) {
  for_type(type, [&]<class E>(E*) {
    launch(poison_kernel<E>, "poison_where_wrong", blocks_for(count), kThreads, stream, table,
           static_cast<E*>(values), count);
  });
}

void scale(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
           void* stream) {
  for_type(type, [&]<class E>(E*) {
    for_type(factor_type, [&]<class F>(F*) {
      launch(scale_kernel<E, F>, "scale_in_place", blocks_for(divide_up(count * size_of(type), 16)),
             kThreads, static_cast<cudaStream_t>(stream), static_cast<E*>(values), count,
             static_cast<const F*>(factor));
    });
  });
}

void column_sums(const ColumnSums& s, cudaStream_t stream) {
  for_type(s.type, [&]<class G>(G*) {
    launch(column_sums_kernel<G>, "column_sums",
           divide_up(s.columns, kStripLanes * 16 / static_cast<std::int64_t>(sizeof(G))), kThreads,
           stream, s);
  });
}

}  // namespace cutloss::cuda
