#include "cuda/fused/targets.h"

#include <cub/device/device_radix_sort.cuh>

#include "cuda/math.cuh"

namespace cutloss::cuda::fused {
namespace {

constexpr int kColumnsOfBlock = 2 * kThreads;

// The sort's arrays: targets and rows as they come, and both in the order of targets.
struct Order {
  unsigned *target, *row, *sorted_target, *sorted_row;
};

Order order_of(const TargetSums& t) {
  auto* first = reinterpret_cast<unsigned*>(t.order);
  return {first, first + t.capacity, first + 2 * std::int64_t{t.capacity},
          first + 3 * std::int64_t{t.capacity}};
}

// The number of bits of V. Rows without a target sort as V, behind all others.
int bits(int V) {
  int count = 1;
  while (count < 32 && (V >> count) != 0) ++count;
  return count;
}

// Sorts rows by target; equal targets stay in the order of their rows.
cudaError_t sort(const Order& o, int capacity, int V, void* scratch, std::size_t& bytes,
                 cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, o.target, o.sorted_target, o.row,
                                         o.sorted_row, capacity, 0, bits(V), stream);
}

__global__ void read_targets(Listed list, int capacity, int V, Order order) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= capacity) return;
  const int left = *list.table.count - list.first;
  const bool counts = i < left && i < list.rows;
  const int target = counts ? list.table.target[list.first + i] : -1;
  order.target[i] = target < 0 ? V : target;
  order.row[i] = i;
}

// The blocks of the first entry of a target sum all rows of that target: no two blocks write one
// element. A frequent word has hundreds of rows, so a row's columns go to many blocks.
__global__ void __launch_bounds__(kThreads) sum_targets(TargetSums t, Order order) {
  const int first = blockIdx.x;
  const unsigned* targets = order.sorted_target;
  const unsigned target = targets[first];
  if (target >= static_cast<unsigned>(t.V) || (first > 0 && targets[first - 1] == target)) return;
  int end = first + 1;
  if (end < t.capacity && targets[end] == target) {
    int beyond = t.capacity;  // the search halves: entries before `end` have this target
    while (end < beyond) {
      const int middle = end + (beyond - end) / 2;
      if (targets[middle] == target) {
        end = middle + 1;
      } else {
        beyond = middle;
      }
    }
  }
  const unsigned* row = order.sorted_row;
  const int d = blockIdx.y * kColumnsOfBlock + 2 * threadIdx.x;
  if (t.sums != nullptr && d < t.depth) {
    float sum[2] = {0.f, 0.f};
#pragma unroll 8
    for (int k = first; k < end; ++k) {
      const auto* e = static_cast<const __nv_bfloat16*>(t.e.data) + row[k] * t.e.stride + d;
      const __nv_bfloat162 pair = *reinterpret_cast<const __nv_bfloat162*>(e);
      const float g = t.target_g[row[k]];
      sum[0] = fmaf(g, __low2float(pair), sum[0]);
      sum[1] = fmaf(g, __high2float(pair), sum[1]);
    }
    *reinterpret_cast<float2*>(t.sums + std::int64_t{first} * t.depth + d) =
        make_float2(sum[0], sum[1]);
  }
  if (blockIdx.y != 0 || threadIdx.x >= 32) return;
  if (t.sums != nullptr && threadIdx.x == 0) t.sum_of_column[target] = first;
  if (t.dbias == nullptr) return;
  double sum = 0;
  for (int k = first + static_cast<int>(threadIdx.x); k < end; k += 32) {
    sum += t.target_g[row[k]];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) t.dbias[target] += sum * t.inverse_scale;
}

}  // namespace

std::int64_t target_sort_bytes(int capacity) {
  // The sort needs copies of the pairs, and memory in which its blocks tell each other their
  // counts.
  return std::int64_t{capacity} * 10 + (std::int64_t{1} << 17);
}

std::int64_t needed_sort_bytes(int capacity, int V) {
  std::size_t bytes = 0;
  check(sort({}, capacity, V, nullptr, bytes, nullptr), "the size of a sort");
  return static_cast<std::int64_t>(bytes);
}

void launch_target_sums(const TargetSums& t, cudaStream_t stream) {
  const Order order = order_of(t);
  launch(read_targets, "read_targets", divide_up(t.capacity, kThreads), kThreads, stream, t.list,
         t.capacity, t.V, order);
  auto bytes = static_cast<std::size_t>(t.sort_bytes);
  check(sort(order, t.capacity, t.V, t.sort, bytes, stream), "a sort of targets");
  const bool wants_dc = t.sums != nullptr;
  if (wants_dc) {
    check(cudaMemsetAsync(t.sum_of_column, 0xff, std::size_t(t.V) * 4, stream),
          "clearing of the targets' places");
  }
  const dim3 blocks(t.capacity, wants_dc ? divide_up(t.depth, kColumnsOfBlock) : 1);
  sum_targets<<<blocks, kThreads, 0, stream>>>(t, order);
  check(cudaGetLastError(), "sum_targets");
}

}  // namespace cutloss::cuda::fused
