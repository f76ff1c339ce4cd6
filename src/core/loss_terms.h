// The coefficients of a loss, row by row: the arithmetic of loss_terms, once for host and device.
#pragma once

#include <cstdint>

#include "core/logit_math.h"
#include "cutloss/cutloss.h"

namespace cutloss {

// Reads the upstream gradients that a call was given for row n, whose lse is `lse`.
template <class T>
CUTLOSS_HOST_DEVICE RowUpstream<T> row_upstream(const RowGradients& given, std::int64_t n, T lse) {
  const auto read = [n](const void* array) {
    return array == nullptr ? T(0) : static_cast<const T*>(array)[n];
  };
  RowUpstream<T> up{read(given.d_nll), read(given.d_lse), read(given.d_entropy),
                    read(given.d_zbar)};
  if (given.d_lse_squared != nullptr) up.d_lse += T(2) * read(given.d_lse_squared) * lse;
  return up;
}

// How much a row counts: 0 where it is ignored.
template <class T>
struct RowWeight {
  T token = 0;
  T weighted = 0;  // token, times the weight of the class of its target
};

// `token_weight` points to the row's own weight, `class_weight` to those of all classes, (V). Null
// stands for 1.
template <class T>
CUTLOSS_HOST_DEVICE RowWeight<T> row_weight(std::int64_t target, std::int64_t ignore_index,
                                            std::int64_t V, const T* token_weight,
                                            const T* class_weight) {
  if (target == ignore_index) return {};
  const T token = token_weight == nullptr ? T(1) : *token_weight;
  if (class_weight == nullptr) return {token, token};
  const std::int64_t in_range = target < 0 ? 0 : target < V ? target : V - 1;
  return {token, token * class_weight[in_range]};
}

// The sums over all rows, and that of the class weights where smoothing needs it.
struct WeightSums {
  double token = 0, weighted = 0, classes = 0;
};

// A mean of nothing is undefined.
inline CUTLOSS_HOST_DEVICE bool is_undefined(bool mean, const WeightSums& sums) {
  return mean && sums.weighted == 0;
}

// A row's weights are divided by the totals, then multiplied with the other numbers. These are all
// 0 where the mean is undefined, so that its gradients are zero.
template <class T>
struct TermScales {
  T total = 1, token_total = 1;
  T nll = 0, lse = 0, zbar = 0, lse_squared = 0;
};

template <class T>
CUTLOSS_HOST_DEVICE TermScales<T> term_scales(bool mean, double label_smoothing, double z_loss,
                                              bool has_class_weight, std::int64_t V,
                                              const WeightSums& sums) {
  TermScales<T> scales;
  if (is_undefined(mean, sums)) return scales;
  if (mean) scales.total = static_cast<T>(sums.weighted);
  if (mean && sums.token != 0) scales.token_total = static_cast<T>(sums.token);
  const double share =
      has_class_weight ? label_smoothing * sums.classes / static_cast<double>(V) : label_smoothing;
  scales.nll = static_cast<T>(1 - label_smoothing);
  scales.lse = static_cast<T>(share);
  scales.zbar = static_cast<T>(-label_smoothing);
  scales.lse_squared = static_cast<T>(z_loss);
  return scales;
}

// The coefficients of one row. z-loss is a mean over tokens without class weights, which say
// nothing about the size of a row's logits.
template <class T>
struct RowTerms {
  T nll, lse, lse_squared, zbar;
};
template <class T>
CUTLOSS_HOST_DEVICE RowTerms<T> row_terms(const RowWeight<T>& weight, const TermScales<T>& scales) {
  const T token = weight.token / scales.total;
  return {weight.weighted / scales.total * scales.nll, token * scales.lse,
          weight.token / scales.token_total * scales.lse_squared, token * scales.zbar};
}

// Makes weighted_loss on the host: counts(n) says whether row n counts.
template <class T, class Counts>
T weighted_sum(std::int64_t rows, Counts counts, const RowOutputs& out, const RowGradients& up,
               const bool* undefined) {
  const auto at = [](const void* array, std::int64_t n) {
    return static_cast<double>(static_cast<const T*>(array)[n]);
  };
  const bool centred = out.zbar_centred != nullptr;
  double sum = undefined != nullptr && *undefined ? std::numeric_limits<double>::quiet_NaN() : 0;
  for (std::int64_t n = 0; n < rows; ++n) {
    if (!counts(n)) continue;
    if (up.d_nll) sum += at(up.d_nll, n) * at(out.nll, n);
    if (up.d_lse) sum += at(up.d_lse, n) * at(centred ? out.log_sum : out.lse, n);
    if (up.d_lse_squared) sum += at(up.d_lse_squared, n) * at(out.lse, n) * at(out.lse, n);
    if (up.d_zbar) sum += at(up.d_zbar, n) * at(centred ? out.zbar_centred : out.zbar, n);
  }
  return static_cast<T>(sum);
}

}  // namespace cutloss
