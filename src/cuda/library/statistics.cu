// Forward's row pass, which reads a block of logits once. A warp takes a piece of a row at a time
// and joins it to the row's state, as row_state.h says. Where rows are few several warps share one:
// each takes a run of pieces, and the runs are joined in order.

#include "cuda/library/piece.cuh"

namespace cutloss::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// The type of what is kept where nothing is: the kernel then needs fewer registers.
struct Nothing {};

// Writes a piece's e^(z - shift) times the softcap's slope to memory. The target's place then holds
// its own slope. Instructions bound this pass, so what most losses do not want is behind branches
// that a whole piece takes. The slopes are made of `from` and `bias`, those of the piece, which are
// read once more, from a cache: there are no registers in which they could have waited.
template <class T, class K>
__device__ __forceinline__ void keep_piece(T (&e)[Piece<T>::kValues], T softcap, const T* from,
                                           const T* bias, int target, K* kept, int columns) {
  using P = Piece<T>;
  constexpr T kScale = std::is_same_v<K, __half> ? T(kept_scale(DType::f16)) : T(1);
  if (softcap == T(0)) {
    if (target >= 0) {
#pragma unroll
      for (int i = 0; i < P::kValues; ++i) {
        if (P::column(i) == target) e[i] = T(1);
      }
    }
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) e[i] *= kScale;
  } else {
    T a[P::kValues];
    load_piece(from, columns, a);
    add_bias(a, bias, columns);
    const T inverse = T(1) / softcap;
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      const T slope = tanh_slope(a[i] * inverse) * kScale;
      e[i] = P::column(i) == target ? slope : e[i] * slope;
    }
  }
  store_piece(e, kept, columns);
}

template <class T, class K, bool kAll>
__device__ __forceinline__ void add_piece(const SlabStatistics<T>& s, std::int64_t row, int piece,
                                          int vocabulary_target, T inv_temperature,
                                          RowState<T>& state) {
  using P = Piece<T>;
  const int first = piece * kPieceColumns<T>;
  const int columns = s.block.columns - first;  // there may be more than a piece has
  T z[P::kValues];
  const T* from = s.block.z + row * s.block.stride + first;
  const T* bias = s.block.bias == nullptr ? nullptr : s.block.bias + first;
  load_piece(from, columns, z);
  [[maybe_unused]] K* kept = static_cast<K*>(s.kept.data) + row * s.kept.stride + first;
  if constexpr (std::is_same_v<K, T>) {
    // With a softcap the products are kept as they are: its slope cannot be told from z.
    if (!s.kept.exponentials && s.block.softcap != T(0)) store_piece(z, kept, columns);
  }
  transform_piece(z, bias, s.block.softcap, inv_temperature, columns);
  if constexpr (std::is_same_v<K, T>) {
    if (!s.kept.exponentials && s.block.softcap == T(0)) store_piece(z, kept, columns);
  }

  if (columns < kPieceColumns<T>) {
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      if (P::column(i) >= columns) z[i] = -infinity<T>();
    }
  }
  int target = vocabulary_target - s.block.first_column - first;
  if (target >= kPieceColumns<T> || target >= columns) target = -1;
  RowState<T> part;
  if (target >= 0) {
    T found = 0;
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      if (P::column(i) == target) {
        found = z[i];
        z[i] = -infinity<T>();
      }
    }
    state.target_logit = __shfl_sync(kAllLanes, found, target / P::kVector % 32);
  }

  T top = -infinity<T>();
#pragma unroll
  for (int i = 0; i < P::kValues; ++i) top = larger(top, z[i]);
  top = warp_max(top);
  // Columns come in their order: only a larger logit can be the first of the largest.
  if (kAll && s.argmax && top > state.max) {
    int column = kPieceColumns<T>;
#pragma unroll
    for (int i = P::kValues - 1; i >= 0; --i) {
      if (z[i] == top) column = P::column(i);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      column = min(column, __shfl_xor_sync(kAllLanes, column, distance));
    }
    part.argmax = s.block.first_column + first + column;
  }

  // Nothing but -inf sums to nothing; a shift of 0 keeps -inf - (-inf) out of it.
  const T shift = top == -infinity<T>() ? T(0) : top;
  if (kAll && s.zbar) {
    T total = 0, weights = 0;
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      const int column = P::column(i);
      if (column >= columns || column == target) continue;
      const T weight = s.class_weight == nullptr ? T(1) : s.class_weight[first + column];
      total += weight * (z[i] - shift);
      weights += weight;
    }
    part.zbar = warp_sum(total);
    part.weight_seen = warp_sum(weights);
  }
  T e[P::kValues];
  T sum = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < P::kValues; ++i) {
    e[i] = std::exp(z[i] - shift);
    sum += e[i];
    if (kAll && s.entropy && e[i] != T(0)) weighted += e[i] * (z[i] - shift);
  }
  sum = warp_sum(sum);
  if (kAll && s.entropy) weighted = warp_sum(weighted);
  if constexpr (!std::is_same_v<K, Nothing>) {
    if (s.kept.exponentials) {
      keep_piece(e, s.block.softcap, from, bias, target, kept, columns);
      if (threadIdx.x % 32 == 0) s.kept.maxima[row * s.kept.maxima_stride + piece] = top;
    }
  }
  part.max = top;
  part.sum = sum;
  part.weighted_sum = weighted;
  merge(state, part);
}

// How many blocks share a multiprocessor, as registers allow.
template <class T, class K, bool kAll>
constexpr int kBlocks = sizeof(T) == 8                        ? 1
                        : std::is_same_v<K, Nothing> && !kAll ? 3
                                                              : 2;

// With kAll entropy, zbar or argmax are wanted.
template <class T, class K, bool kAll>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, K, kAll>))
    statistics_kernel(SlabStatistics<T> s, int warps_per_row) {
  // These are bytes because a RowState has initialisers, which shared memory may not have.
  alignas(16) __shared__ unsigned char bytes[kWarps * sizeof(RowState<T>)];
  auto* shared = reinterpret_cast<RowState<T>*>(bytes);
  const int warp = threadIdx.x / 32;
  const int part = warp % warps_per_row;
  const std::int64_t row =
      std::int64_t{blockIdx.x} * (kWarps / warps_per_row) + warp / warps_per_row;
  const std::int64_t entry = s.block.first_entry + row;
  const bool live = row < s.block.rows && s.block.table.row[entry] >= 0;
  RowState<T> state;
  if (live) {
    if (part == 0 && s.block.first_column > 0) state = s.states[row];
    if (!kAll) {  // registers are short, so what is not wanted must not take one
      state.zbar = state.weight_seen = 0;
      state.argmax = -1;
    }
    const int target = s.block.table.target[entry];
    const T inv_temperature = static_cast<const T*>(s.block.table.inv_temperature)[entry];
    const int pieces = (s.block.columns + kPieceColumns<T> - 1) / kPieceColumns<T>;
    const int end = pieces * (part + 1) / warps_per_row;
    for (int piece = pieces * part / warps_per_row; piece < end; ++piece) {
      add_piece<T, K, kAll>(s, row, piece, target, inv_temperature, state);
    }
  }
  if (warps_per_row > 1) {
    if (threadIdx.x % 32 == 0) shared[warp] = state;
    __syncthreads();
    if (part == 0) {
      for (int i = 1; i < warps_per_row; ++i) merge(state, shared[warp + i]);
    }
  }
  if (live && part == 0 && threadIdx.x % 32 == 0) s.states[row] = state;
}

// How many warps share a row: enough in all to fill a large GPU. The number is the same for every
// GPU, so that all make the same bits.
int warps_for(std::int64_t rows, std::int64_t pieces) {
  constexpr std::int64_t kEnough = 4096;
  int warps = 1;
  while (warps < kWarps && rows * warps < kEnough && warps * 2 <= pieces) warps *= 2;
  return warps;
}

template <class T, class K>
void run(const SlabStatistics<T>& s, cudaStream_t stream) {
  const int warps = warps_for(s.block.rows, divide_up(s.block.columns, kPieceColumns<T>));
  const bool all = s.entropy || s.zbar || s.argmax;
  launch(all ? statistics_kernel<T, K, true> : statistics_kernel<T, K, false>, "row_statistics",
         divide_up(s.block.rows, kWarps / warps), kThreads, stream, s, warps);
}

}  // namespace

template <class T>
void row_statistics(const SlabStatistics<T>& s, cudaStream_t stream) {
  if (s.kept.data == nullptr) return run<T, Nothing>(s, stream);
  for_stored_type<T>(s.kept.type, [&]<class K>(K*) { run<T, K>(s, stream); });
}
template void row_statistics(const SlabStatistics<float>& s, cudaStream_t stream);
template void row_statistics(const SlabStatistics<double>& s, cudaStream_t stream);

}  // namespace cutloss::cuda
