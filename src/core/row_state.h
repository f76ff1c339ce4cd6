// A row's statistics while its columns are seen, part by part: one state, one merge, one close, for
// slabs, for threads that share a row, for lanes and for clusters. docs/math.md derives them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace cutloss {

// The columns seen so far, **the target left out**: adding the target exactly at the end keeps
// every digit of nll on confident rows, and makes nll >= 0 by construction. Sums are relative to
// `max`, so that an offset common to all logits costs them no digit.
template <class T>
struct RowState {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;           // the sum of e^(z - max)
  T weighted_sum = 0;  // the sum of e^(z - max) (z - max), for the entropy
  T zbar = 0;          // the sum of weight_v (z_v - max)
  T weight_seen = 0;   // the sum of weight_v
  T target_logit = std::numeric_limits<T>::quiet_NaN();  // a number once the target is seen
  std::int64_t argmax = -1;  // the first of the largest among the others
};

// e^x, as a functor: kernels may have a quicker one.
struct Exp {
  template <class T>
  CUTLOSS_HOST_DEVICE T operator()(T x) const {
    return std::exp(x);
  }
};

// Makes e^(a - b), where a <= b. Two -inf make 0, an empty sum, and not NaN.
template <class T, class E = Exp>
CUTLOSS_HOST_DEVICE T rescale(T a, T b, E exp = {}) {
  return a == -std::numeric_limits<T>::infinity() ? T(0) : exp(a - b);
}

// The number that zbar's sum is relative to, since all logits may be -inf.
template <class T>
CUTLOSS_HOST_DEVICE T finite_or_zero(T max) {
  return max == -std::numeric_limits<T>::infinity() ? T(0) : max;
}

// Makes a state relative to `top`, which no logit of its columns exceeds.
template <class T, class E = Exp>
CUTLOSS_HOST_DEVICE void move_to(RowState<T>& state, T top, E exp = {}) {
  const T scale = rescale(state.max, top, exp);
  const T shift = state.max == -std::numeric_limits<T>::infinity() ? T(0) : state.max - top;
  state.weighted_sum = scale * (state.weighted_sum + shift * state.sum);
  state.sum *= scale;
  if (state.weight_seen != T(0)) {  // where none is, no code
    state.zbar += state.weight_seen * (finite_or_zero(state.max) - finite_or_zero(top));
  }
  state.max = top;
}

// Joins the statistics of other columns. Associative on paper only: call it in a fixed order. Of
// equal maxima the smaller index is the argmax, whatever that order. Where neither state has seen
// the target, or its logit is NaN, there is none.
template <class T, class E = Exp>
CUTLOSS_HOST_DEVICE void merge(RowState<T>& state, RowState<T> other, E exp = {}) {
  if (other.target_logit == other.target_logit) state.target_logit = other.target_logit;
  const bool first = other.argmax >= 0 && other.argmax < state.argmax;
  if (other.sum != T(0) &&  // else nothing but -inf; a NaN goes on
      (other.max > state.max || state.argmax < 0 || (other.max == state.max && first))) {
    state.argmax = other.argmax;
  }
  const T top = other.max > state.max ? other.max : state.max;
  move_to(state, top, exp);
  move_to(other, top, exp);
  state.weighted_sum += other.weighted_sum;
  state.sum += other.sum;
  state.zbar += other.zbar;
  state.weight_seen += other.weight_seen;
}

template <class T>
struct RowResult {
  T nll, lse, row_max, log_sum, entropy;
  T zbar;          // sum_v weight_v z_v / V
  T zbar_centred;  // sum_v weight_v (z_v - row_max) / V
  std::int64_t argmax;
};

// Adds the target, with the weight of its class (used by zbar alone), and closes the row.
template <class T>
CUTLOSS_HOST_DEVICE RowResult<T> close(const RowState<T>& state, std::int64_t target,
                                       T target_weight, std::int64_t V) {
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

  const T top = finite_or_zero(row.row_max);
  const T centred = state.zbar + state.weight_seen * (finite_or_zero(state.max) - top) +
                    target_weight * (z - top);
  row.zbar_centred = centred / static_cast<T>(V);
  row.zbar = row.zbar_centred + (state.weight_seen + target_weight) / static_cast<T>(V) * top;
  const bool target_first =
      alone || z > state.max || (z == state.max && target < state.argmax) || state.argmax < 0;
  row.argmax = target_first ? target : state.argmax;
  if (alone && z == -inf) row.argmax = 0;
  return row;
}

}  // namespace cutloss
