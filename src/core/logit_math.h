// The formulas of one row and one logit, written once for host and device. Engines vectorise
// the inner loops and take everything else from here. docs/math.md derives them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define CUTLOSS_HOST_DEVICE __host__ __device__
#else
#define CUTLOSS_HOST_DEVICE
#endif

namespace cutloss {

// A row's running statistics over the vocabulary columns seen so far, **the target left out**:
// adding the target exactly at the end keeps every digit of nll on confident rows, and makes
// nll >= 0 by construction.
template <class T>
struct RowState {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;           // of e^(z - max)
  T weighted_sum = 0;  // of e^(z - max) (z - max), for the entropy
  T zbar_sum = 0;      // of weight_v z_v, target included
  T target_logit = std::numeric_limits<T>::quiet_NaN();
  std::int64_t argmax = -1;  // of the others; the first of equals
};

// e^(a - b), where a <= b; two -inf make 0 (an empty sum), not NaN.
template <class T>
CUTLOSS_HOST_DEVICE T rescale(T a, T b) {
  return a == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(a - b);
}

// Joins the statistics of later columns to those of earlier ones. Associative on paper only:
// call it in a fixed order.
template <class T>
CUTLOSS_HOST_DEVICE void merge(RowState<T>& state, T max, T sum, T weighted_sum,
                               std::int64_t argmax) {
  if (sum == T(0)) return;  // nothing but -inf; a NaN goes on
  const bool later_wins = max > state.max || state.argmax < 0;
  const T top = max > state.max ? max : state.max;
  const T old_scale = rescale(state.max, top);
  const T new_scale = rescale(max, top);
  const T old_shift = state.sum == T(0) ? T(0) : state.max - top;
  const T new_shift = max == -std::numeric_limits<T>::infinity() ? T(0) : max - top;
  state.weighted_sum = old_scale * (state.weighted_sum + old_shift * state.sum) +
                       new_scale * (weighted_sum + new_shift * sum);
  state.sum = state.sum * old_scale + sum * new_scale;
  state.max = top;
  if (later_wins) state.argmax = argmax;
}

template <class T>
struct RowResult {
  T nll, lse, row_max, log_sum, entropy, zbar;
  std::int64_t argmax;
};

// Adds the target and closes the row.
template <class T>
CUTLOSS_HOST_DEVICE RowResult<T> finish(const RowState<T>& state, std::int64_t target,
                                        std::int64_t V) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const T z = state.target_logit;
  const bool alone = state.sum == T(0);
  const T gap = alone ? -inf : state.max - z;
  RowResult<T> row;
  if (alone || gap <= T(0)) {  // the target is the maximum
    row.row_max = z;
    row.nll = alone ? T(0) : std::log1p(state.sum * std::exp(gap));
    row.log_sum = row.nll;
  } else {  // gap > 0, or NaN
    row.row_max = state.max;
    row.log_sum = std::log(state.sum + std::exp(-gap));
    row.nll = gap + row.log_sum;
  }
  // Without a finite maximum the softmax is undefined, as in PyTorch.
  if (row.row_max == inf || row.row_max == -inf || z != z) {
    row.nll = row.log_sum = std::numeric_limits<T>::quiet_NaN();
  }
  row.lse = (row.row_max == inf || row.row_max == -inf) && state.sum == state.sum
                ? row.row_max
                : row.row_max + row.log_sum;

  // H = log_sum - W / S, both sums over all columns and relative to row_max.
  const T others = rescale(state.max, row.row_max);
  const T others_shift = alone ? T(0) : state.max - row.row_max;
  const T own = rescale(z, row.row_max);
  const T own_shift = z == -inf ? T(0) : z - row.row_max;
  const T W = others * (state.weighted_sum + others_shift * state.sum) + own * own_shift;
  row.entropy = row.log_sum - W * std::exp(-row.log_sum);
  if (row.entropy < T(0)) row.entropy = T(0);  // the last rounding

  row.zbar = state.zbar_sum / static_cast<T>(V);
  const bool target_first =
      alone || z > state.max || (z == state.max && target < state.argmax) || state.argmax < 0;
  row.argmax = target_first ? target : state.argmax;
  if (alone && z == -inf) row.argmax = 0;
  return row;
}

// The coefficients of one row's g: with t = (z - row_max) - log_sum = log p,
//   g_v = [p (a - d_entropy (t + H)) + zbar weight_v] dz/da
// for v != target, and g_target exactly; dz/da as transform.h has it.
template <class T>
struct RowCoefficients {
  T row_max, log_sum;
  T a;          // d_nll + d_lse
  T d_entropy;  // 0: the term is skipped, not multiplied
  T entropy;
  T zbar;  // d_zbar / V
  T softcap;
  T inv_temperature;
};

// The upstream gradients of a row's outputs; that of lse includes that of its square.
template <class T>
struct RowUpstream {
  T d_nll = 0, d_lse = 0, d_entropy = 0, d_zbar = 0;
};

// Where nothing but the upstream gradients and the row's statistics enters. The entropy, where
// d_entropy is not 0, and the transform are the caller's to add.
template <class T>
CUTLOSS_HOST_DEVICE RowCoefficients<T> row_coefficients(const RowUpstream<T>& up, T nll, T row_max,
                                                        T log_sum, std::int64_t V) {
  RowCoefficients<T> k{};
  k.row_max = row_max;
  k.log_sum = log_sum;
  // A row without a softmax (NaN or inf among its logits) has no gradient: NaN throughout.
  k.a = nll == nll ? up.d_nll + up.d_lse : nll;
  k.d_entropy = up.d_entropy;
  k.zbar = up.d_zbar / static_cast<T>(V);
  return k;
}

// g at the target, without the transform's slope. 1 - p_target comes from nll, so that it keeps
// its digits where p is near 1.
template <class T>
CUTLOSS_HOST_DEVICE T target_gradient(const RowCoefficients<T>& row, T nll, T d_nll, T d_lse,
                                      T weight) {
  const T p = std::exp(-nll);
  T g = d_lse * p + d_nll * std::expm1(-nll);
  if (row.d_entropy != T(0) && p != T(0)) g -= row.d_entropy * p * (row.entropy - nll);
  if (row.zbar != T(0)) g += row.zbar * weight;
  return g;
}

}  // namespace cutloss
