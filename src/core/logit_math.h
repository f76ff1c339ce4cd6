// The formulas of one row and one logit, written once for host and device. Engines vectorise
// the inner loops and take everything else from here. docs/math.md derives them.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "core/row_state.h"

namespace cutloss {

// The coefficients of one row's g: with t = (z - row_max) - log_sum = log p,
//   g_v = [p (a - d_entropy (t + H)) + zbar weight_v] dz/da
// for v != target, and g_target exactly; dz/da as transform.h has it.
template <class T>
struct RowCoefficients {
  T row_max, log_sum;
  T a;          // d_nll + d_lse
  T d_entropy;  // where it is 0 the term is skipped, not multiplied
  T entropy;
  T zbar;  // d_zbar / V
  T softcap;
  T inv_temperature;
};

// The upstream gradients of a row's outputs. d_lse includes what comes from the square of lse.
template <class T>
struct RowUpstream {
  T d_nll = 0, d_lse = 0, d_entropy = 0, d_zbar = 0;
};

// Makes the coefficients that follow from the upstream gradients and the row's statistics alone.
// The caller adds the entropy, where d_entropy is not 0, and the numbers of the transform.
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

// Makes g at the target, without the transform's slope. 1 - p_target comes from nll, so that it
// keeps its digits where p is near 1.
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
