// One kernel for statistics and gradient of rows of logits.
//
// The kernel waits for memory. A row is therefore read once: the blocks that share it (a cluster,
// which exchanges a few numbers) hold it in their shared memory between the statistics, which need
// all of it, and the gradient. What does not fit there is read again, from the L2 cache at best.
// Copies to shared memory run ahead of the arithmetic, and several blocks share a multiprocessor,
// so that one reads while another computes or writes.
//
// Rows are seen as vectors of 16 bytes that are aligned in memory, wherever a row begins: the first
// and the last may hold elements of other rows, which are not looked at and not written.
#pragma once

#include <climits>
#include <cmath>

#include "core/loss_terms.h"
#include "core/row_outputs.h"
#include "core/transform.h"
#include "cuda/logits/cluster.cuh"
#include "cuda/logits/logits_rows.h"
#include "cuda/math.cuh"
#include "cuda/rows/row_facts.cuh"

namespace cutloss::cuda {
namespace {

constexpr int kMostRowThreads = 512;

// How many blocks of kMostRowThreads share a multiprocessor, for which the compiler limits
// registers. Where the sum alone is wanted 40 registers suffice: with 62 fewer blocks fit, and rows
// of 131072 took 1.54 times the time of their copy instead of 1.31 (H200). Counting instructions is
// worth it: reading shared memory by 16 bytes instead of 2 made that 1.23.
template <class T, bool kPlain>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 1
                              : kPlain       ? 3
                                             : 2;

constexpr int kAhead = 8;  // how many copies to shared memory a thread has under way

template <class E>
using Vector = Pack<E, 16 / static_cast<int>(sizeof(E))>;
template <class E>
constexpr int kVectorOf = 16 / static_cast<int>(sizeof(E));

// A column that no vector holds. A target outside of [0, V) must not be found among the elements of
// other rows either.
constexpr int kNoColumn = INT_MIN / 2;

// Makes e^x for x <= 0 in two instructions, to 2 ulp; results under 2^-126 are 0.
__device__ __forceinline__ float exp_nonpositive(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
}
__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }

// Reads all 16 bytes at once: left to itself the compiler reads shared memory element by element.
template <class E>
__device__ __forceinline__ Vector<E> load(const Vector<E>* at) {
  Vector<E> vector;
  *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<const uint4*>(at);
  return vector;
}

template <class E, class T>
__device__ __forceinline__ void widen_all(const Vector<E>& vector, T (&z)[kVectorOf<E>]) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {  // this takes one instruction each, cuda_bf16.h
                                                     // two
    const auto* pairs = reinterpret_cast<const unsigned*>(vector.value);
#pragma unroll
    for (int i = 0; i < kVectorOf<E>; i += 2) {
      z[i] = __uint_as_float(pairs[i / 2] << 16);
      z[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVectorOf<E>; ++i) z[i] = widen<T>(vector.value[i]);
  }
}

template <class E, class T>
__device__ __forceinline__ Vector<E> narrow_all(const T (&z)[kVectorOf<E>]) {
  Vector<E> vector;
#pragma unroll
  for (int i = 0; i < kVectorOf<E>; ++i) {
    // The 16-bit dtypes are rounded in pairs, which takes half the instructions.
    if constexpr (std::is_same_v<E, __nv_bfloat16>) {
      if (i % 2 == 0) {
        *reinterpret_cast<__nv_bfloat162*>(&vector.value[i]) =
            __floats2bfloat162_rn(z[i], z[i + 1]);
      }
    } else if constexpr (std::is_same_v<E, __half>) {
      if (i % 2 == 0) {
        *reinterpret_cast<__half2*>(&vector.value[i]) = __floats2half2_rn(z[i], z[i + 1]);
      }
    } else {
      vector.value[i] = narrow<E>(z[i]);
    }
  }
  return vector;
}

// A block's part of a row.
template <class E>
struct Slice {
  const Vector<E>* data;
  int first_column;  // the column of data[0], less than 0 where the row begins later
  int count;         // how many vectors it has
};

template <class E>
__device__ __forceinline__ Slice<E> slice_of(const E* row, int V, int parts, int part) {
  constexpr int kVector = kVectorOf<E>;
  const int lead = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(E));
  const int vectors = (V - 1 + lead) / kVector + 1;
  const int each = (vectors - 1) / parts + 1;
  const int first = min(part * each, vectors);
  return {reinterpret_cast<const Vector<E>*>(row - lead) + first, first * kVector - lead,
          min(each, vectors - first)};
}

// Calls use(vector, i) for the thread's vectors of [begin, end). kAtOnce loads are ahead of the
// first use.
template <int kAtOnce, class E, class Use>
__device__ __forceinline__ void for_each_vector(const Vector<E>* data, int begin, int end,
                                                Use use) {
  const int stride = static_cast<int>(blockDim.x);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kAtOnce * stride) {
    Vector<E> vectors[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j * stride < end) vectors[j] = load<E>(data + i + j * stride);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j * stride < end) use(vectors[j], i + j * stride);
    }
  }
}

// What all vectors of a row have in common.
template <class T>
struct RowView {
  int V;
  int target;  // the target's column, or kNoColumn
  T softcap, inv_temperature;
};

template <class T, int kVector>
__device__ __forceinline__ void transform(const RowView<T>& row, T (&z)[kVector]) {
  if (row.softcap != T(0)) {
    const T inverse = T(1) / row.softcap;
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] = row.softcap * std::tanh(z[i] * inverse);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) z[i] *= row.inv_temperature;
}

template <int kVector, class T>
__device__ __forceinline__ bool holds_target(const RowView<T>& row, int column) {
  return static_cast<unsigned>(row.target) - static_cast<unsigned>(column) <
         static_cast<unsigned>(kVector);
}

// Joins a vector's logits to a thread's state, as row_state.h's merge does. With kPlain z is the
// logit as it is, and nothing but the sum is wanted.
template <bool kPlain, class E, class T>
__device__ __forceinline__ void add_vector(const LogitRows<T>& s, const RowView<T>& row,
                                           const Vector<E>& vector, int column,
                                           RowState<T>& state) {
  constexpr int kVector = kVectorOf<E>;
  T z[kVector];
  widen_all<E>(vector, z);
  if (!kPlain) transform(row, z);
  if (column < 0 || column + kVector > row.V) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i < 0 || column + i >= row.V) z[i] = -infinity<T>();
    }
  }
  if (holds_target<kVector>(row, column)) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i == row.target) {
        state.target_logit = z[i];
        z[i] = -infinity<T>();
      }
    }
  }
  T top = z[0];
#pragma unroll
  for (int i = 1; i < kVector; ++i) top = larger(top, z[i]);
  if (top > state.max) {
    const T scale = exp_nonpositive(state.max - top);  // -inf - top is no NaN here
    if (!kPlain) {
      const T shift = state.sum == T(0) ? T(0) : state.max - top;
      state.weighted_sum = scale * (state.weighted_sum + shift * state.sum);
      state.zbar += state.weight_seen * (finite_or_zero(state.max) - top);
      if (s.rows.argmax != nullptr) {
#pragma unroll
        for (int i = kVector - 1; i >= 0; --i) {
          if (z[i] == top) state.argmax = column + i;
        }
      }
    }
    state.sum *= scale;
    state.max = top;
  }
  // Nothing but -inf sums to nothing; a shift of 0 keeps -inf - (-inf) out of it.
  const T shift = finite_or_zero(state.max);
  if (!kPlain && (s.rows.zbar != nullptr || s.rows.zbar_centred != nullptr)) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i < 0 || column + i >= row.V || column + i == row.target) continue;
      const T weight = s.class_weight == nullptr ? T(1) : s.class_weight[column + i];
      state.zbar += weight * (z[i] - shift);
      state.weight_seen += weight;
    }
  }
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const T e = exp_nonpositive(z[i] - shift);
    sum += e;
    if (!kPlain && s.rows.entropy != nullptr && e != T(0)) {
      state.weighted_sum += e * (z[i] - shift);
    }
  }
  state.sum += sum;
}

__device__ __forceinline__ int warp_min(int value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = min(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Merges the states of a warp's lanes, which are of different columns, to one in every lane. It is
// row_state.h's merge of all at once. Of equal logits the first is the argmax, whichever lane has
// it.
template <bool kPlain, class T>
__device__ void merge_lanes(RowState<T>& state) {
  const T top = warp_max(state.max);
  if (kPlain) {
    state.sum = warp_sum(rescale(state.max, top) * state.sum);
    state.max = top;
  } else {
    const bool has_it = state.max == top && state.argmax >= 0;
    const int argmax = warp_min(has_it ? static_cast<int>(state.argmax) : INT_MAX);
    state.argmax = argmax == INT_MAX ? -1 : argmax;
    move_to(state, top);
    state.sum = warp_sum(state.sum);
    state.weighted_sum = warp_sum(state.weighted_sum);
    state.zbar = warp_sum(state.zbar);
    state.weight_seen = warp_sum(state.weight_seen);
  }
  // At most one lane has found the target; where its logit is NaN, so is the row.
  const unsigned found = __ballot_sync(kAllLanes, state.target_logit == state.target_logit);
  if (found != 0) state.target_logit = __shfl_sync(kAllLanes, state.target_logit, __ffs(found) - 1);
}

// Makes the gradient of a vector's logits.
template <bool kPlain, class E, class T>
__device__ __forceinline__ Vector<E> vector_gradient(const RowCoefficients<T>& k,
                                                     const RowView<T>& row, T target_g, T factor,
                                                     const T* class_weight, const Vector<E>& vector,
                                                     int column) {
  constexpr int kVector = kVectorOf<E>;
  T z[kVector];
  widen_all<E>(vector, z);
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] = exp_nonpositive(z[i] - k.row_max) * factor;
    if (holds_target<kVector>(row, column)) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i == row.target) z[i] = target_g;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const T logit = transformed(z[i], row.softcap, row.inv_temperature);
      const T t = (logit - k.row_max) - k.log_sum;
      const T p = exp_nonpositive(t);
      T g = p * k.a;
      if (k.d_entropy != T(0) && p != T(0)) g -= p * k.d_entropy * (t + k.entropy);
      if (k.zbar != T(0)) {
        const bool inside = column + i >= 0 && column + i < row.V;
        g += class_weight == nullptr ? k.zbar : inside ? k.zbar * class_weight[column + i] : T(0);
      }
      if (column + i == row.target) g = target_g;
      z[i] = g * transform_slope(z[i], row.softcap, row.inv_temperature);
    }
  }
  return narrow_all<E>(z);
}

// Where a row's gradient goes.
template <class E>
struct Output {
  E* row;
  bool aligned;  // whether its vectors lie as those of the logits do

  __device__ __forceinline__ void store(const Vector<E>& vector, int column, int V) const {
    constexpr int kVector = kVectorOf<E>;
    if (aligned && column >= 0 && column + kVector <= V) {
      *reinterpret_cast<Vector<E>*>(row + column) = vector;
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i >= 0 && column + i < V) row[column + i] = vector.value[i];
    }
  }
};

// `held` is the number of vectors that a block has shared memory for. Blocks that make statistics
// together are a cluster.
template <class E, class T, bool kPlain>
__global__ void __launch_bounds__(kMostRowThreads, (kBlocksAtOnce<T, kPlain>))
    logit_rows_kernel(LogitRows<T> s, int blocks_per_row, int held) {
  constexpr int kVector = kVectorOf<E>;
  constexpr int kAtOnce = 2;
  extern __shared__ uint4 shared_vectors[];
  auto* kept = reinterpret_cast<Vector<E>*>(shared_vectors);
  // These are bytes because a RowState has initialisers, which shared memory may not have.
  alignas(16) __shared__ unsigned char state_bytes[33 * sizeof(RowState<T>)];
  auto* states =
      reinterpret_cast<RowState<T>*>(state_bytes);  // those of the warps, then the block's
  __shared__ RowCoefficients<T> shared_k;
  __shared__ T shared_target_g;

  const RowFacts& f = s.facts;
  const int position = static_cast<int>(blockIdx.x / static_cast<unsigned>(blocks_per_row));
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks_per_row));
  const int sequence = position / f.map.length, at = position % f.map.length;
  const E* row = static_cast<const E*>(s.logits) + sequence * s.sequence_stride + at * s.row_stride;
  const Slice<E> slice = slice_of(row, f.V, blocks_per_row, part);
  Output<E> out{nullptr, false};
  if (s.gradient != nullptr) {
    out.row = static_cast<E*>(s.gradient) + sequence * s.gradient_sequence_stride +
              at * s.gradient_row_stride;
    out.aligned = reinterpret_cast<std::uintptr_t>(out.row) % 16 ==
                  reinterpret_cast<std::uintptr_t>(row) % 16;
  }

  const bool predicts = at < f.map.predicted;
  const int n = f.map.row(sequence, at);
  const std::int64_t target = predicts ? target_at(f, position) : f.ignore_index;
  if (target == f.ignore_index) {  // the whole cluster leaves
    if (out.row != nullptr) {
      const Vector<E> zeros{};
      for (int i = static_cast<int>(threadIdx.x); i < slice.count;
           i += static_cast<int>(blockDim.x)) {
        out.store(zeros, slice.first_column + i * kVector, f.V);
      }
    }
    if (predicts && s.statistics && part == 0 && threadIdx.x == 0) {
      write_row(s.rows, n, RowResult<T>{0, 0, 0, 0, 0, 0, 0, -1});
    }
    return;
  }

  const bool inside = target >= 0 && target < f.V;
  RowView<T> view{f.V, inside ? static_cast<int>(target) : kNoColumn, s.softcap, T(1)};
  if (!kPlain) view.inv_temperature = s.logit_scale * inv_temperature<T>(f, n);
  const int in_shared = s.statistics ? min(slice.count, held) : 0;
  const bool clustered = s.statistics && blocks_per_row > 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int stride = static_cast<int>(blockDim.x);

  RowState<T> state;
  if (s.statistics) {
    const auto add = [&](const Vector<E>& vector, int i) {
      add_vector<kPlain, E>(s, view, vector, slice.first_column + i * kVector, state);
    };
    int ahead = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (ahead < in_shared) fetch(kept + ahead, slice.data + ahead);
      fetch_commit();
      ahead += stride;
    }
    // A thread reads back what it copied itself, here and below: no barrier is needed.
    for (int i = static_cast<int>(threadIdx.x); i < in_shared; i += stride) {
      fetch_wait<kAhead - 1>();
      const Vector<E> vector = load<E>(kept + i);
      if (ahead < in_shared) fetch(kept + ahead, slice.data + ahead);
      fetch_commit();
      ahead += stride;
      add(vector, i);
    }
    for_each_vector<kAtOnce, E>(slice.data, in_shared, slice.count, add);

    merge_lanes<kPlain>(state);
    if (lane == 0) states[warp] = state;
    __syncthreads();
    if (warp == 0) {
      state = lane < stride / 32 ? states[lane] : RowState<T>{};
      merge_lanes<kPlain>(state);
      if (lane == 0) states[32] = state;
    }
    if (clustered) {
      __syncwarp();
      cluster_arrive();
      cluster_wait();
      if (warp == 0) {
        state = lane < blocks_per_row ? *in_block(&states[32], lane) : RowState<T>{};
        merge_lanes<kPlain>(state);
      }
    }
  }

  if (threadIdx.x == 0) {
    RowResult<T> result{};
    if (s.statistics) {
      const T weight = !inside || s.class_weight == nullptr ? T(1) : s.class_weight[target];
      result = closed(state, inside ? target : kWrongTarget, weight, f.V);
      if (part == 0) write_row(s.rows, n, result);
    } else {
      result.nll = read<T>(s.rows.nll, n);
      result.row_max = read<T>(s.rows.row_max, n);
      result.log_sum = read<T>(s.rows.log_sum, n);
      result.entropy = read<T>(s.rows.entropy, n);
    }
    if (out.row != nullptr) {
      const RowUpstream<T> up = row_upstream<T>(s.upstream, n, result.row_max + result.log_sum);
      RowCoefficients<T> k = row_coefficients(up, result.nll, result.row_max, result.log_sum, f.V);
      if (k.d_entropy != T(0)) k.entropy = result.entropy;
      const T weight = s.class_weight == nullptr || !inside ? T(1) : s.class_weight[target];
      shared_k = k;
      shared_target_g = target_gradient(k, result.nll, up.d_nll, up.d_lse, weight);
    }
  }
  __syncthreads();
  if (clustered) cluster_arrive_after_reads();  // this block has read what others hold
  if (out.row != nullptr) {
    const RowCoefficients<T> k = shared_k;
    const T target_g = shared_target_g;
    const T factor = k.a * std::exp(-k.log_sum);
    const auto put = [&](const Vector<E>& vector, int i) {
      const int column = slice.first_column + i * kVector;
      out.store(
          vector_gradient<kPlain, E>(k, view, target_g, factor, s.class_weight, vector, column),
          column, f.V);
    };
    for (int i = static_cast<int>(threadIdx.x); i < in_shared; i += stride) {
      put(load<E>(kept + i), i);
    }
    for_each_vector<kAtOnce, E>(slice.data, in_shared, slice.count, put);
  }
  if (clustered) {  // a block stays until the others have read what it holds
    __syncwarp();
    cluster_wait();
  }
}

// --- launch -------------------------------------------------------------------------------------

// The shared memory beside the vectors, the system's kilobyte included.
constexpr std::int64_t kOtherShared = 3 << 10;
// Three blocks with slices of this size share a multiprocessor of Hopper (228 KB). On an H200, in
// units of a copy: rows of 64 KB take 1.10 in one block and 1.14 in two, rows of 100 KB 1.24 in one
// and 1.15 in two, rows of 256 KB 1.69 in two, 1.23 in four, 1.20 in eight.
constexpr std::int64_t kGoodSlice = 66 << 10;
constexpr int kMostBlocksPerRow = 8;  // every GPU with clusters allows clusters of so many
// The size of a slice that is worth a block, and a number of blocks that fill a large GPU. They are
// the same for every GPU, so that all make the same bits.
constexpr std::int64_t kLeastSlice = 8 << 10;
constexpr std::int64_t kEnoughBlocks = 1024;
// How many vectors a block takes that only makes gradients.
constexpr std::int64_t kGradientVectors = 2048;

struct LogitLaunch {
  std::int64_t blocks_per_row = 1;
  int threads = kThreads;
  std::int64_t held = 0;
};

inline std::int64_t slice_bytes(std::int64_t vectors, std::int64_t blocks) {
  return divide_up(vectors, blocks) * 16;
}

// Whether the kernel can run in clusters: its own code must be compiled for them, and the device
// must have them.
template <class Kernel>
bool has_clusters(Kernel kernel) {
  if (current_device().sm < 90) return false;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's attributes");
  return attributes.ptxVersion >= 90;
}

inline int round_threads(std::int64_t threads, int most) {
  return static_cast<int>(std::min<std::int64_t>(std::max<std::int64_t>(threads, 64), most)) / 32 *
         32;
}

inline LogitLaunch launch_for(std::int64_t positions, std::int64_t vectors, bool statistics,
                              int asked, bool clusters) {
  LogitLaunch launch;
  if (!statistics) {
    launch.blocks_per_row = divide_up(vectors, kGradientVectors);
    launch.threads = round_threads(round_up(divide_up(vectors, 4), 32), kThreads);
    return launch;
  }
  std::int64_t blocks = 1;
  const auto halving_helps = [&] {
    if (slice_bytes(vectors, blocks) > kGoodSlice) return true;
    return positions * blocks < kEnoughBlocks && slice_bytes(vectors, 2 * blocks) >= kLeastSlice;
  };
  while (clusters && blocks < kMostBlocksPerRow && halving_helps()) blocks *= 2;
  if (asked != 0) blocks = asked;
  const std::int64_t bytes = slice_bytes(vectors, blocks);
  const std::int64_t room = current_device().shared_bytes - kOtherShared;
  launch.blocks_per_row = blocks;
  launch.held = std::min(bytes, room) / 16;
  // With more threads each has too few vectors; a block that has its multiprocessor for itself
  // takes what it can (rows of 1 MB: 1.54 with 512, 1.90 with 256).
  const std::int64_t fit = (current_device().shared_bytes + 1024) / (bytes + kOtherShared);
  const std::int64_t for_vectors = round_up(divide_up(divide_up(vectors, blocks), 4), 32);
  launch.threads = round_threads(
      std::min<std::int64_t>(fit > 1 ? kThreads : kMostRowThreads, for_vectors), kMostRowThreads);
  return launch;
}

}  // namespace

template <class E, class T>
void run_logit_rows(const LogitRows<T>& s, int asked, cudaStream_t stream) {
  const RowFacts& f = s.facts;
  const bool plain = s.softcap == T(0) && s.logit_scale == T(1) && f.temperature == nullptr &&
                     f.temperature_scale == 1 && s.rows.zbar == nullptr &&
                     s.rows.zbar_centred == nullptr && s.rows.argmax == nullptr &&
                     s.rows.entropy == nullptr && s.upstream.d_entropy == nullptr &&
                     s.upstream.d_zbar == nullptr;
  const auto kernel = plain ? logit_rows_kernel<E, T, true> : logit_rows_kernel<E, T, false>;
  const bool clusters = has_clusters(kernel);
  if (asked > 1 && !clusters) {
    throw Error(ErrorCode::unsupported, text("blocks_per_row = ", asked,
                                             " needs clusters of blocks (sm_90 or later, and "
                                             "code compiled for it); the device is sm_",
                                             current_device().sm, ": leave blocks_per_row 0"));
  }
  constexpr int kVector = kVectorOf<E>;
  const std::int64_t vectors = divide_up(std::int64_t{f.V} + kVector - 1, kVector);
  const LogitLaunch launch = launch_for(s.positions, vectors, s.statistics, asked, clusters);
  const std::int64_t blocks = s.positions * launch.blocks_per_row;
  if (blocks > INT_MAX) {
    throw Error(ErrorCode::unsupported,
                text("logit_rows: ", s.positions, " rows of ", f.V, " logits are too many blocks"));
  }
  const auto shared = static_cast<int>(launch.held * 16);
  if (shared > 0) {
    // Properties of the kernel on the current device; setting them again costs a microsecond.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "a kernel's shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "a kernel's shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.blocks_per_row);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  if (s.statistics && launch.blocks_per_row > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, s, static_cast<int>(launch.blocks_per_row),
                           static_cast<int>(launch.held)),
        "logit_rows");
}

}  // namespace cutloss::cuda
