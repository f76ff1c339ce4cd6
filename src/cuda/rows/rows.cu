// Kernels with a thread for each row, which make the list of rows, their results and coefficients.

#include "core/dtype.h"
#include "core/loss_terms.h"
#include "core/row_outputs.h"
#include "cuda/device_calls.h"
#include "cuda/math.cuh"
#include "cuda/rows/kernels.h"
#include "cuda/rows/row_facts.cuh"
#include "cuda/rows/row_facts.h"

namespace cutloss::cuda {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kScanRows = 4;  // how many rows a thread takes at a time

template <class T>
__device__ void write_entry(const RowFacts& f, const RowTable& table, int entry, int n) {
  table.row[entry] = n;
  table.position[entry] = static_cast<int>(f.map.position(n));
  table.target[entry] = static_cast<int>(column_of(target_of(f, n), f.classes));
  static_cast<T*>(table.inv_temperature)[entry] = inv_temperature<T>(f, n);
}

template <class T>
__device__ void write_nothing(const RowTable& table, int entry) {
  table.row[entry] = -1;
  table.position[entry] = -1;
  table.target[entry] = kWrongTarget;
  static_cast<T*>(table.inv_temperature)[entry] = T(1);
}

// Returns the sum of `mine` over the threads before this one, and writes that over all to *all.
__device__ int scan(int mine, int* all) {
  __shared__ int sums[kScanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int sum = sums[lane];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += before;
    }
    sums[lane] = sum;
  }
  __syncthreads();
  const int before = inclusive - mine + (warp == 0 ? 0 : sums[warp - 1]);
  *all = sums[kScanThreads / 32 - 1];
  __syncthreads();  // sums is written again in the next round
  return before;
}

// One block makes the list, which is short beside the logits and has the order of the rows.
template <class T>
__global__ void __launch_bounds__(kScanThreads) list_rows_kernel(RowFacts f, RowTable table) {
  int found = 0;
  for (int base = 0; base < f.rows; base += kScanThreads * kScanRows) {
    const int first = base + static_cast<int>(threadIdx.x) * kScanRows;
    bool there[kScanRows];
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kScanRows; ++i) {
      there[i] = first + i < f.rows && counts(f, first + i);
      mine += there[i] ? 1 : 0;
    }
    int all;
    int entry = found + scan(mine, &all);
#pragma unroll
    for (int i = 0; i < kScanRows; ++i) {
      if (there[i]) {
        write_entry<T>(f, table, f.compact ? entry++ : first + i, first + i);
      } else if (!f.compact && first + i < f.rows) {
        write_nothing<T>(table, first + i);
      }
    }
    found += all;
  }
  if (f.compact) {
    for (int entry = found + static_cast<int>(threadIdx.x); entry < f.rows; entry += kScanThreads) {
      write_nothing<T>(table, entry);
    }
  }
  if (threadIdx.x == 0) {
    *table.count = found;
    *table.mismatch = f.num_valid >= 0 && f.num_valid != found ? 1 : 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    clear_ignored_kernel(RowFacts f, RowTable table, RowOutputs out) {
  const int n = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (n >= f.rows) return;
  const bool wrong = *table.mismatch != 0;
  if (!wrong && counts(f, n)) return;
  clear_row(out, n, wrong ? not_a_number<T>() : T(0));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_rows_kernel(RowTable table, std::int64_t first, int count, const RowState<T>* states,
                       const T* class_weight, RowOutputs out, Classes classes) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= count) return;
  const std::int64_t n = table.row[first + i];
  if (n < 0) return;
  if (*table.mismatch != 0) return clear_row(out, n, not_a_number<T>());
  const int target = table.target[first + i];
  const T weight = target < 0 || class_weight == nullptr ? T(1) : class_weight[target];
  finish_row(out, n, states[i], target, weight, classes);
}

// A thread closes a row from the states of all shards, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    close_rows_kernel(RowFacts f, RowStates s, std::int64_t count, RowOutputs out) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const std::int64_t n = s.some.rows == nullptr ? i : s.some.rows[i];
  if (n < 0) return;
  if (s.is_right != nullptr && !*s.is_right) return clear_row(out, n, not_a_number<T>());
  if (!counts(f, static_cast<int>(n))) return clear_row(out, n, T(0));
  const std::int64_t own = column_of(target_of(f, static_cast<int>(n)), f.classes);
  const auto* weights = static_cast<const T*>(s.class_weight);
  const T weight = own < 0 || weights == nullptr ? T(1) : weights[own];
  write_row(out, n, closed(merged<T>(s, n), own, weight, f.V));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    empty_states_kernel(std::int64_t rows, RowState<T>* states) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < rows) states[n] = {};
}

template <class T>
__device__ T block_max(T value) {
  __shared__ T most[32];
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_max(threadIdx.x % 32 < blockDim.x / 32 ? most[threadIdx.x % 32] : T(0));
  __syncthreads();
  return value;
}

// This is for fp16 products alone, so the rows are in fp32. A NaN is left out of the maximum: its
// row makes NaN anyway.
__global__ void __launch_bounds__(kScanThreads)
    make_scalars_kernel(Coefficients c, float logit_scale, DeviceScalars* scalars) {
  float weight = 1;
  if (c.class_weight != nullptr && c.upstream.d_zbar != nullptr) {
    weight = 0;
    for (std::int64_t v = threadIdx.x; v < c.classes.count; v += kScanThreads) {
      weight = fmaxf(weight, fabsf(static_cast<const float*>(c.class_weight)[v]));
    }
    weight = block_max(weight);
  }
  float most = 0;
  for (std::int64_t i = threadIdx.x; i < c.count; i += kScanThreads) {
    const std::int64_t n = c.table.row[c.first + i];
    if (n < 0) continue;
    // p |log p + H| <= 1 + H
    const float lse = read<float>(c.rows.row_max, n) + read<float>(c.rows.log_sum, n);
    const RowUpstream<float> up = row_upstream<float>(c.upstream, n, lse);
    float g = fabsf(up.d_nll) + fabsf(up.d_lse) +
              fabsf(up.d_zbar) / static_cast<float>(c.classes.total) * weight;
    if (c.upstream.d_entropy != nullptr) {
      g += fabsf(up.d_entropy) * (1 + read<float>(c.rows.entropy, n));
    }
    most = fmaxf(most, g * static_cast<const float*>(c.table.inv_temperature)[c.first + i]);
  }
  most = block_max(most);
  if (threadIdx.x != 0) return;
  int exponent = 0;
  if (most > 0 && most < infinity<float>()) frexpf(most, &exponent);
  exponent = min(max(13 - exponent, -100), 100);
  const float scale = ldexpf(1.0f, exponent), inverse = ldexpf(1.0f, -exponent);
  *scalars = {logit_scale * inverse, 0.0f, 1.0f, scale, inverse};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    make_coefficients_kernel(Coefficients c, const DeviceScalars* scalars, RowGradient<T>* rows) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= c.count) return;
  const std::int64_t n = c.table.row[c.first + i];
  if (n < 0) return;
  const T scale = scalars != nullptr ? static_cast<T>(scalars->scale) : T(1);
  const T nll = read<T>(c.rows.nll, n);
  const T row_max = read<T>(c.rows.row_max, n), log_sum = read<T>(c.rows.log_sum, n);
  RowUpstream<T> up = row_upstream<T>(c.upstream, n, row_max + log_sum);
  up = {up.d_nll * scale, up.d_lse * scale, up.d_entropy * scale, up.d_zbar * scale};
  RowCoefficients<T> k = row_coefficients(up, nll, row_max, log_sum, c.classes.total);
  if (k.d_entropy != T(0)) k.entropy = read<T>(c.rows.entropy, n);
  k.inv_temperature = static_cast<const T*>(c.table.inv_temperature)[c.first + i];
  const int target = c.table.target[c.first + i];
  const T weight = c.class_weight == nullptr || target < 0
                       ? T(1)
                       : static_cast<const T*>(c.class_weight)[target];
  const T target_g = target_gradient(k, nll, up.d_nll, up.d_lse, weight);
  rows[i] = {k.row_max,   k.log_sum, k.a,    target_g,
             k.d_entropy, k.entropy, k.zbar, k.inv_temperature};
}

}  // namespace

template <class T>
void list_rows(const RowFacts& facts, const RowTable& table, cudaStream_t stream) {
  launch(list_rows_kernel<T>, "list_rows", 1, kScanThreads, stream, facts, table);
}

template <class T>
void clear_ignored(const RowFacts& facts, const RowTable& table, const RowOutputs& out,
                   cudaStream_t stream) {
  launch(clear_ignored_kernel<T>, "clear_ignored", divide_up(facts.rows, kThreads), kThreads,
         stream, facts, table, out);
}

template <class T>
void finish_rows(const RowTable& table, std::int64_t first, std::int64_t count,
                 const RowState<T>* states, const T* class_weight, const RowOutputs& out,
                 const Classes& classes, cudaStream_t stream) {
  launch(finish_rows_kernel<T>, "finish_rows", divide_up(count, kThreads), kThreads, stream, table,
         first, static_cast<int>(count), states, class_weight, out, classes);
}

void close_rows(const LossRows& rows, const RowStates& states, const RowOutputs& out,
                void* stream) {
  for_stat(rows.type, [&]<class T>(T*) {
    const RowFacts facts = row_facts(rows, states.targets);
    const std::int64_t count = states.some.rows == nullptr ? facts.rows : states.some.count;
    launch(close_rows_kernel<T>, "close_rows", divide_up(count, kThreads), kThreads,
           static_cast<cudaStream_t>(stream), facts, states, count, out);
  });
}

void empty_states(DType stat, std::int64_t rows, void* states, void* stream) {
  for_stat(stat, [&]<class T>(T*) {
    launch(empty_states_kernel<T>, "empty_states", divide_up(rows, kThreads), kThreads,
           static_cast<cudaStream_t>(stream), rows, static_cast<RowState<T>*>(states));
  });
}

void make_scalars(const Coefficients& coefficients, double logit_scale, DeviceScalars* scalars,
                  cudaStream_t stream) {
  launch(make_scalars_kernel, "make_scalars", 1, kScanThreads, stream, coefficients,
         static_cast<float>(logit_scale), scalars);
}

template <class T>
void make_coefficients(const Coefficients& coefficients, const DeviceScalars* scalars,
                       RowGradient<T>* rows, cudaStream_t stream) {
  launch(make_coefficients_kernel<T>, "make_coefficients", divide_up(coefficients.count, kThreads),
         kThreads, stream, coefficients, scalars, rows);
}

#define CUTLOSS_INSTANCES(T)                                                                     \
  template void list_rows<T>(const RowFacts&, const RowTable&, cudaStream_t);                    \
  template void clear_ignored<T>(const RowFacts&, const RowTable&, const RowOutputs&,            \
                                 cudaStream_t);                                                  \
  template void finish_rows<T>(const RowTable&, std::int64_t, std::int64_t, const RowState<T>*,  \
                               const T*, const RowOutputs&, const Classes&, cudaStream_t);       \
  template void make_coefficients<T>(const Coefficients&, const DeviceScalars*, RowGradient<T>*, \
                                     cudaStream_t);
CUTLOSS_INSTANCES(float)
CUTLOSS_INSTANCES(double)

}  // namespace cutloss::cuda
