#include "cuda/fused/rows.h"

#include "core/loss_terms.h"
#include "core/row_outputs.h"
#include "core/transform.h"
#include "cuda/math.cuh"
#include "cuda/rows/row_facts.cuh"

namespace cutloss::cuda::fused {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr float kReferenceAbove = 15.f;
// Beyond these a product of x with scaled rows of E could leave the range of bf16.
constexpr float kLeastSum = 1e-30f, kMostSum = 1e20f;

__device__ int listed_rows(const Listed& list) {
  const int left = *list.table.count - list.first;
  return left < 0 ? 0 : (left < list.rows ? left : list.rows);
}

__global__ void clear_statistics(Partials partials, std::int64_t entries, float* target_logit,
                                 int rows) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows) target_logit[i] = nanf("");
  if (i >= entries) return;
  partials.max_and_sum[i] = make_float2(-INFINITY, 0.f);
  if (partials.weight_and_argmax != nullptr) {
    partials.weighted_and_zbar[i] = make_float2(0.f, 0.f);
    partials.weight_and_argmax[i] = make_float2(0.f, __int_as_float(-1));
  }
}

// Closes entry i. `class_weight` is that of the classes here, or null.
__device__ void finish(const RowOutputs& out, const Listed& list, int i,
                       const RowState<float>& state, const float* class_weight,
                       const Classes& classes) {
  const int entry = list.first + i;
  const std::int64_t n = list.table.row[entry];
  if (*list.table.mismatch != 0) return clear_row(out, n, nanf(""));
  const int target = list.table.target[entry];
  const float weight = target < 0 || class_weight == nullptr ? 1.f : class_weight[target];
  finish_row(out, n, state, target, weight, classes);
}

// The state of a row from another lane. No lane has seen the row's target.
__device__ RowState<float> shuffled(const RowState<float>& state, int lanes) {
  RowState<float> other;
  other.max = __shfl_down_sync(~0u, state.max, lanes);
  other.sum = __shfl_down_sync(~0u, state.sum, lanes);
  other.weighted_sum = __shfl_down_sync(~0u, state.weighted_sum, lanes);
  other.zbar = __shfl_down_sync(~0u, state.zbar, lanes);
  other.weight_seen = __shfl_down_sync(~0u, state.weight_seen, lanes);
  other.argmax = __shfl_down_sync(~0u, state.argmax, lanes);
  return other;
}

// A warp merges a row: each lane a few slots in order, then the lanes in order.
__global__ void merge_rows(Merge m) {
  const int rows = listed_rows(m.list);
  __shared__ TileWalk walk;
  if (threadIdx.x == 0) {
    const int block_rows = m.partials.block_rows;
    walk = TileWalk::make((rows + block_rows - 1) / block_rows, 1, m.clusters, m.largest_group);
  }
  __syncthreads();
  const int i = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= rows) return;
  const int run = walk.run_of_block(i / m.partials.block_rows);
  const int slots = m.partials.slots * walk.sharers(run);
  RowState<float> state;
  for (int slot = lane; slot < slots; slot += kWarp) {
    const std::int64_t at = m.partials.index(walk, run, slot, i);
    const float2 ms = m.partials.max_and_sum[at];
    RowState<float> other;
    other.max = ms.x;
    other.sum = ms.y;
    if (m.all) {
      const float2 wz = m.partials.weighted_and_zbar[at];
      const float2 more = m.partials.weight_and_argmax[at];
      other.weighted_sum = wz.x;
      other.zbar = wz.y;
      other.weight_seen = more.x;
      other.argmax = __float_as_int(more.y);
    }
    cutloss::merge(state, other);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) cutloss::merge(state, shuffled(state, lanes));
  if (lane != 0) return;
  if (!m.first_slab) {
    RowState<float> earlier = m.states[i];
    cutloss::merge(earlier, state);
    state = earlier;
  }
  if (!m.last_slab) {
    m.states[i] = state;
    return;
  }
  state.target_logit = m.target_logit[i];
  finish(m.out, m.list, i, state, m.class_weight, m.classes);
}

__global__ void references_of_rows(References r) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *r.redo = 0;
  const int i = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= listed_rows(r.list)) return;
  const int target = r.list.table.target[r.list.first + i];
  const int column = target == kTargetElsewhere ? (r.list.first + i) % r.columns : target;
  float z = -INFINITY, a = 0.f;  // these stay for a target out of range, which `finish` makes NaN
  if (column >= 0) {
    const auto* e = static_cast<const __nv_bfloat16*>(r.e.data) + i * r.e.stride;
    const auto* c = static_cast<const __nv_bfloat16*>(r.c.data) + column * r.c.stride;
    float sum = 0.f;
    for (int d = lane * 8; d < r.depth; d += kWarp * 8) {  // rows are whole vectors of 16 bytes
      const uint4 e8 = *reinterpret_cast<const uint4*>(e + d);
      const uint4 c8 = *reinterpret_cast<const uint4*>(c + d);
      const auto* ep = reinterpret_cast<const __nv_bfloat16*>(&e8);
      const auto* cp = reinterpret_cast<const __nv_bfloat16*>(&c8);
      for (int k = 0; k < 8; ++k) {
        sum = fmaf(__bfloat162float(ep[k]), __bfloat162float(cp[k]), sum);
      }
    }
    sum = warp_sum(sum);
    const float t = r.transform.inv_temperature[i];
    z = sum * (r.transform.scale * t);
    if (r.transform.bias != nullptr) z = fmaf(r.transform.bias[column], t, z);
    if (r.transform.softcap != 0.f) {
      // Both the logit and its slope are made of the product as it is.
      a = r.transform.scale * sum;
      if (r.transform.bias != nullptr) a += r.transform.bias[column];
      z = transformed(a, r.transform.softcap, t);
    }
  }
  if (lane != 0) return;
  const float own = r.transform.softcap == 0.f ? z : a;
  r.target_logit[i] = target == kTargetElsewhere ? nanf("") : own;
  r.reference[i] = z == -INFINITY ? 0.f : z + kReferenceAbove;
}

__global__ void close_rows(Close k) {
  if (k.again && *k.redo == 0) return;
  const int i = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= listed_rows(k.list)) return;
  const float2* partial = k.sum_and_max + std::int64_t{i} * k.column_tiles;
  float sum = 0.f, top = -INFINITY;
  for (int tile = lane; tile < k.column_tiles; tile += kWarp) {
    sum += partial[tile].x;
    top = fmaxf(top, partial[tile].y);
  }
  sum = warp_sum(sum);
  top = warp_max(top);
  if (lane != 0) return;
  const float reference = k.reference[i];
  const bool finite_top = top > -INFINITY && top < INFINITY;
  if (!k.again && finite_top && !(sum >= kLeastSum && sum <= kMostSum) && reference == reference) {
    k.reference[i] = top;
    *k.redo = 1;
    return;
  }
  RowState<float> state;
  state.max = top;
  // e^(z - reference) to e^(z - maximum). An infinite logit makes NaN, as in every engine.
  state.sum = top == -INFINITY ? sum : sum * expf(reference - top);
  state.target_logit = k.target_logit[i];
  if (k.transform.softcap != 0.f) {
    state.target_logit =
        transformed(state.target_logit, k.transform.softcap, k.transform.inv_temperature[i]);
  }
  finish(k.out, k.list, i, state, nullptr, k.classes);  // there is no zbar by rows
}

__global__ void row_factors(FactorInputs k, RowFactors out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= listed_rows(k.list)) return;
  const std::int64_t n = k.list.table.row[k.list.first + i];
  const float nll = read<float>(k.rows.nll, n), row_max = read<float>(k.rows.row_max, n);
  const float log_sum = read<float>(k.rows.log_sum, n);
  const RowUpstream<float> up = row_upstream<float>(k.upstream, n, row_max + log_sum);
  const float inv_temperature = k.inv_temperature[i];
  // A row without a softmax has no gradient: NaN throughout.
  const float a = nll == nll ? up.d_nll + up.d_lse : nll;
  const float alone = a == 0.f ? 0.f : expf((out.reference[i] - row_max) - log_sum);
  out.factor[i] = a * alone * (inv_temperature * k.scale);
  const float g = target_gradient(RowCoefficients<float>{}, nll, up.d_nll, up.d_lse, 1.f);
  const float slope = transform_slope(out.target_logit[i], k.softcap, inv_temperature);
  const bool elsewhere = k.list.table.target[k.list.first + i] == kTargetElsewhere;
  out.target_g[i] = elsewhere ? 0.f : g * slope * k.scale;
}

// A block copies a row, 8 elements a thread at a time.
__global__ void scaled_rows(Listed list, Matrix e, const float* factor, int depth, void* scaled,
                            std::int64_t stride) {
  const int i = blockIdx.x;
  const bool counts = i < listed_rows(list);
  const float k = counts ? factor[i] : 0.f;
  const auto* from = static_cast<const __nv_bfloat16*>(e.data) + i * e.stride;
  auto* to = static_cast<__nv_bfloat16*>(scaled) + i * stride;
  for (int d = threadIdx.x * 8; d < depth; d += blockDim.x * 8) {
    uint4 out = {};
    if (counts) {
      const uint4 in = *reinterpret_cast<const uint4*>(from + d);
      const auto* a = reinterpret_cast<const __nv_bfloat16*>(&in);
      auto* b = reinterpret_cast<__nv_bfloat16*>(&out);
      for (int j = 0; j < 8; ++j) b[j] = __float2bfloat16(__bfloat162float(a[j]) * k);
    }
    *reinterpret_cast<uint4*>(to + d) = out;
  }
}

template <class Out>
__global__ void store_de(StoreDe s) {
  const int i = blockIdx.x;
  if (i >= listed_rows(s.list)) return;
  const int entry = s.list.first + i;
  const int target = s.list.table.target[entry];
  const float factor = s.factor[i], g = s.target_g[i];
  const float* sums = s.sums + std::int64_t{i} * s.depth;
  const auto* c =
      static_cast<const __nv_bfloat16*>(s.c.data) + (target < 0 ? 0 : target) * s.c.stride;
  Out* to = static_cast<Out*>(s.de) + std::int64_t{s.list.table.position[entry]} * s.depth;
  for (int d = threadIdx.x * 4; d < s.depth; d += blockDim.x * 4) {
    const float4 sum = *reinterpret_cast<const float4*>(sums + d);
    const float all[4] = {sum.x, sum.y, sum.z, sum.w};
    Out four[4];
    for (int j = 0; j < 4; ++j) {
      const float others = factor * all[j];
      four[j] = narrow<Out>(
          target == kTargetElsewhere ? others : fmaf(g, __bfloat162float(c[d + j]), others));
    }
    for (int j = 0; j < 4; ++j) to[d + j] = four[j];
  }
}

// A thread takes two columns; 32 rows are summed in fp32, those sums in fp64.
__global__ void add_dbias(Listed list, const __nv_bfloat16* x, std::int64_t stride,
                          const float* factor, double inverse_scale, int V, double* dbias,
                          bool first) {
  const int v = (blockIdx.x * kThreads + threadIdx.x) * 2;
  if (v >= V) return;
  const int rows = listed_rows(list);
  double sum[2] = {0, 0};
  for (int i = 0; i < rows; i += 32) {
    float few[2] = {0.f, 0.f};
    const int end = min(i + 32, rows);
#pragma unroll 8
    for (int k = i; k < end; ++k) {
      const __nv_bfloat162 pair =
          *reinterpret_cast<const __nv_bfloat162*>(x + k * stride + v);  // rows are padded
      const float f = factor[k];
      few[0] = fmaf(f, __low2float(pair), few[0]);
      few[1] = fmaf(f, __high2float(pair), few[1]);
    }
    sum[0] += few[0];
    sum[1] += few[1];
  }
  for (int j = 0; j < 2 && v + j < V; ++j) {
    dbias[v + j] = (first ? 0.0 : dbias[v + j]) + sum[j] * inverse_scale;
  }
}

__global__ void clear_if_none(const int* count, uint4* values, std::int64_t pieces) {
  if (*count != 0) return;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pieces;
       i += std::int64_t{gridDim.x} * kThreads) {
    values[i] = {};
  }
}

__global__ void clear_rest(Listed list, unsigned short* matrix, std::int64_t stride, int columns,
                           int block_rows) {
  const int rows = listed_rows(list);
  const int covered = (rows + block_rows - 1) / block_rows * block_rows;
  for (std::int64_t i = covered + blockIdx.x; i < list.rows; i += gridDim.x) {
    for (int v = threadIdx.x; v < columns; v += blockDim.x) matrix[i * stride + v] = 0;
  }
}

}  // namespace

void launch_clear_statistics(const Partials& partials, std::int64_t entries, float* target_logit,
                             int rows, cudaStream_t stream) {
  const std::int64_t items = entries > rows ? entries : rows;
  launch(clear_statistics, "clear_statistics", divide_up(items, kThreads), kThreads, stream,
         partials, entries, target_logit, rows);
}

void launch_merge(const Merge& merge, cudaStream_t stream) {
  launch(merge_rows, "merge_rows", divide_up(merge.list.rows, kWarps), kThreads, stream, merge);
}

void launch_references(const References& references, cudaStream_t stream) {
  launch(references_of_rows, "references_of_rows", divide_up(references.list.rows, kWarps),
         kThreads, stream, references);
}

void launch_close(const Close& close, cudaStream_t stream) {
  launch(close_rows, "close_rows", divide_up(close.list.rows, kWarps), kThreads, stream, close);
}

void launch_row_factors(const FactorInputs& k, const RowFactors& out, cudaStream_t stream) {
  launch(row_factors, "row_factors", divide_up(k.list.rows, kThreads), kThreads, stream, k, out);
}

void launch_scaled_rows(const Listed& list, const Matrix& e, const float* factor, int depth,
                        void* scaled, std::int64_t stride, cudaStream_t stream) {
  launch(scaled_rows, "scaled_rows", list.rows, kThreads, stream, list, e, factor, depth, scaled,
         stride);
}

void launch_store_de(const StoreDe& s, cudaStream_t stream) {
  const auto kernel = s.de_type == DType::f32   ? store_de<float>
                      : s.de_type == DType::f16 ? store_de<__half>
                                                : store_de<__nv_bfloat16>;
  launch(kernel, "store_de", s.list.rows, kThreads, stream, s);
}

void launch_add_dbias(const Listed& list, const void* x, std::int64_t x_stride, const float* factor,
                      double inverse_scale, int V, double* dbias, bool first, cudaStream_t stream) {
  launch(add_dbias, "add_dbias", divide_up((V + 1) / 2, kThreads), kThreads, stream, list,
         static_cast<const __nv_bfloat16*>(x), x_stride, factor, inverse_scale, V, dbias, first);
}

void launch_clear_if_none(const int* count, void* values, std::int64_t bytes, cudaStream_t stream) {
  launch(clear_if_none, "clear_if_none", 1024, kThreads, stream, count, static_cast<uint4*>(values),
         bytes / 16);
}

void launch_clear_rest(const Listed& list, void* matrix, std::int64_t stride, int columns,
                       int block_rows, cudaStream_t stream) {
  launch(clear_rest, "clear_rest", 256, kThreads, stream, list,
         static_cast<unsigned short*>(matrix), stride, columns, block_rows);
}

}  // namespace cutloss::cuda::fused
