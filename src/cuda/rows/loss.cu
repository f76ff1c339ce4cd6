// The kernels that make a loss's coefficients from targets, and the sum of the rows' outputs times
// them. Each is one block, which sums in fp64 and in a fixed order: each thread takes every 1024th
// row, then the threads' sums are added.
#include "core/dtype.h"
#include "core/loss_terms.h"
#include "cuda/device_calls.h"
#include "cuda/math.cuh"
#include "cuda/rows/row_facts.cuh"
#include "cuda/rows/row_facts.h"

namespace cutloss::cuda {
namespace {

constexpr int kSumThreads = 1024;

// Returns the block's sum to every thread of it.
template <class U>
__device__ U block_sum(U value) {
  __shared__ U sums[kSumThreads / 32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_sum(sums[threadIdx.x % 32]);
  __syncthreads();  // sums is written again by the next call
  return value;
}

template <class T>
__device__ RowWeight<T> weight_of(const RowFacts& f, const Weighting& w, int n) {
  const auto* token_weight = static_cast<const T*>(w.token_weight);
  return row_weight<T>(target_of(f, n), f.ignore_index, f.V,
                       token_weight == nullptr ? nullptr : token_weight + f.map.target(n),
                       static_cast<const T*>(w.class_weight));
}

template <class T>
__device__ void write(void* array, int n, T value) {
  if (array != nullptr) static_cast<T*>(array)[n] = value;
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    loss_terms_kernel(RowFacts f, Weighting w, LossTerms terms) {
  WeightSums sums;
  if (w.mean) {
    for (int n = static_cast<int>(threadIdx.x); n < f.rows; n += kSumThreads) {
      const RowWeight<T> weight = weight_of<T>(f, w, n);
      sums.token += static_cast<double>(weight.token);
      sums.weighted += static_cast<double>(weight.weighted);
    }
    sums.token = block_sum(sums.token);
    sums.weighted = block_sum(sums.weighted);
  }
  if (w.label_smoothing > 0 && w.class_weight != nullptr) {
    for (int v = static_cast<int>(threadIdx.x); v < f.V; v += kSumThreads) {
      sums.classes += static_cast<double>(static_cast<const T*>(w.class_weight)[v]);
    }
    sums.classes = block_sum(sums.classes);
  }
  if (threadIdx.x == 0) *terms.undefined = is_undefined(w.mean, sums);
  const auto scales =
      term_scales<T>(w.mean, w.label_smoothing, w.z_loss, w.class_weight != nullptr, f.V, sums);
  for (int n = static_cast<int>(threadIdx.x); n < f.rows; n += kSumThreads) {
    const RowTerms<T> row = row_terms(weight_of<T>(f, w, n), scales);
    write(terms.nll, n, row.nll);
    write(terms.lse, n, row.lse);
    write(terms.lse_squared, n, row.lse_squared);
    write(terms.zbar, n, row.zbar);
  }
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_loss_kernel(RowFacts f, RowOutputs out, RowGradients up, const bool* undefined, T* loss) {
  const bool centred = out.zbar_centred != nullptr;
  double sum = 0;
  int valid = 0;
  for (int n = static_cast<int>(threadIdx.x); n < f.rows; n += kSumThreads) {
    if (!counts(f, n)) continue;
    ++valid;
    if (up.d_nll) sum += double(read<T>(up.d_nll, n)) * read<T>(out.nll, n);
    if (up.d_lse) {
      sum += double(read<T>(up.d_lse, n)) * read<T>(centred ? out.log_sum : out.lse, n);
    }
    if (up.d_lse_squared) {
      const double lse = read<T>(out.lse, n);
      sum += double(read<T>(up.d_lse_squared, n)) * lse * lse;
    }
    if (up.d_zbar) {
      sum += double(read<T>(up.d_zbar, n)) * read<T>(centred ? out.zbar_centred : out.zbar, n);
    }
  }
  sum = block_sum(sum);
  valid = block_sum(valid);
  if (threadIdx.x != 0) return;
  const bool wrong = f.num_valid >= 0 && f.num_valid != valid;
  const bool nothing = undefined != nullptr && *undefined;
  *loss = wrong || nothing ? not_a_number<T>() : static_cast<T>(sum);
}

}  // namespace

void loss_terms(const LossRows& rows, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream) {
  for_stat(rows.type, [&]<class T>(T*) {
    launch(loss_terms_kernel<T>, "loss_terms", 1, kSumThreads, static_cast<cudaStream_t>(stream),
           row_facts(rows, targets), weighting, terms);
  });
}

void sum_loss(const LossSum& s, void* loss, void* stream) {
  for_stat(s.rows.type, [&]<class T>(T*) {
    launch(sum_loss_kernel<T>, "sum_loss", 1, kSumThreads, static_cast<cudaStream_t>(stream),
           row_facts(s.rows, s.targets), s.out, s.upstream, s.undefined, static_cast<T*>(loss));
  });
}

}  // namespace cutloss::cuda
