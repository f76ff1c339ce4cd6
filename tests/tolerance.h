// How far an engine may be from the fp64 reference. Two rules:
//
// 1. Every element: a bound derived from the rounding errors that are unavoidable, to first
//    order. With u the unit roundoff of the accumulator, a sum of k products of norms |e| |c| is
//    allowed gamma(k) |e| |c|, gamma(k) = u (8 + 4 sqrt(k)): the error of k roundings is about
//    u sqrt(k) where they are independent, and 4 of those are never seen; 8 covers short sums.
//    That bounds the error of a logit, and what depends on it follows from the derivatives in
//    docs/math.md. nll is bounded *relative to nll*: a confident row keeps its digits.
// 2. All elements together, for 16-bit products on random logits: the root mean square of the
//    errors is what two roundings of g (one where its softmax is kept, one where it becomes an
//    operand) and one of the output make, times kRmsSlack. An accumulation in 16 bits does not
//    pass.
//
// The rule "at most twice the error of the plain path in the same dtype" is held by the Python
// tests, against PyTorch itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "problems.h"
#include "reference/number.h"
#include "reference/reference.h"

namespace cutloss::test {

inline double gamma(double u, std::int64_t terms) {
  return u * (8 + 4 * std::sqrt(static_cast<double>(terms)));
}

// Where e^x underflows: fp32 without subnormals.
inline constexpr double kUnderflow = 0x1p-126;
inline constexpr int kRoundingsOfG = 2;
inline constexpr double kRmsSlack = 1.25;
// A rounding's relative error is uniform within u / m, m in [1, 2) the significand: with m evenly
// spread on a logarithmic scale its mean square is u^2 / 3 times the mean of 1 / m^2, 0.54.
inline constexpr double kMeanSquareOfRounding = 0.18;

struct Bounds {
  std::vector<double> logit;  // (N): of the row's finite logits, the largest error
  std::vector<double> nll, lse, entropy, zbar, zbar_centred;
  std::vector<double> de, dc, dbias;
  // Expected root mean square of the errors (rule 2).
  double de_rms = 0, dc_rms = 0;
};

namespace detail {

struct RoundingUnits {
  double accumulator;  // of fp32, or of fp64
  double operand;      // of g as it enters the products
  double inputs;       // of E and C, beyond what the reference rounds too
};

// An engine that multiplies f16 rounds g to it, as others do to bf16. tf32 has f16's 11 bits, and
// processors may cut the others off instead of rounding.
inline RoundingUnits rounding_units(const Problem& p, DType compute_type) {
  const bool wide = compute_type == DType::f64;
  const double accumulator = reference::unit_roundoff(wide ? DType::f64 : DType::f32);
  if (compute_type == DType::f32 && p.allow_tf32) return {accumulator, 0x1p-10, 0x1p-10};
  const bool narrow = compute_type == DType::bf16 || compute_type == DType::f16;
  return {accumulator, narrow ? reference::unit_roundoff(compute_type) : 2 * accumulator, 0};
}

// What an element of g loses beside the largest possible one of the same problem, where g is f16:
// it is scaled so that the largest is within a factor of 8 of f16's, and the smallest step of f16
// is 2^-40 of that.
inline constexpr double kF16Underflow = 0x1p-36;

inline double norm(const std::vector<double>& matrix, std::int64_t row, std::int64_t D) {
  double squares = 0;
  for (std::int64_t d = 0; d < D; ++d) squares += matrix[row * D + d] * matrix[row * D + d];
  return std::sqrt(squares);
}

inline double stat_or(const Array& array, std::int64_t index, double otherwise) {
  return array.count == 0 ? otherwise : array.get(index);
}

// The largest error of a logit before softcap and temperature.
inline std::vector<double> product_bounds(const Data& data, const reference::Result& r) {
  const Problem& p = data.problem;
  const auto [u, _, u_inputs] = rounding_units(p, r.compute_type);
  double largest_c = 0;
  for (std::int64_t v = 0; v < r.V; ++v) largest_c = std::max(largest_c, norm(r.c, v, r.D));
  double largest_bias = 0;
  for (std::int64_t v = 0; head_of(p).has_bias && v < r.V; ++v) {
    const double bias = std::fabs(data.bias.get(v));
    if (std::isfinite(bias)) largest_bias = std::max(largest_bias, bias);
  }
  std::vector<double> bounds(r.N, 0);
  for (std::int64_t n = 0; n < r.N; ++n) {
    const double product = std::fabs(p.transform.logit_scale) * norm(r.e, n, r.D) * largest_c;
    bounds[n] = gamma(u, r.D) * (product + largest_bias) + 2 * u_inputs * product;
  }
  return bounds;
}

inline double row_temperature(const Data& data, std::int64_t n) {
  return data.problem.transform.temperature * stat_or(data.temperature, n, 1.0);
}

inline void row_bounds(const Data& data, const reference::Result& r,
                       const std::vector<double>& product, Bounds& b) {
  const Problem& p = data.problem;
  const double u = rounding_units(p, r.compute_type).accumulator;
  const double sum = gamma(u, r.V);
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0 || !std::isfinite(r.lse[n])) continue;
    const double* z = r.z.data() + n * r.V;
    double largest_z = 0, distance = 0, weighted = 0, centred = 0, weights = 0;
    for (std::int64_t v = 0; v < r.V; ++v) {
      if (!std::isfinite(z[v])) continue;
      const double weight = stat_or(data.class_weight, v, 1.0);
      largest_z = std::max(largest_z, std::fabs(z[v]));
      distance += std::exp(z[v] - r.lse[n]) * std::fabs(z[v] - r.row_max[n]);
      weights += std::fabs(weight) / static_cast<double>(r.V);
      weighted += std::fabs(weight * z[v]) / static_cast<double>(r.V);
      centred += std::fabs(weight * (z[v] - r.row_max[n])) / static_cast<double>(r.V);
    }
    const double cap_rounding = p.transform.softcap ? 4 * u * *p.transform.softcap : 0;
    const double logit = (product[n] + cap_rounding) / row_temperature(data, n) + 4 * u * largest_z;
    const double share = -std::expm1(-r.nll[n]);  // 1 - p_target
    const double gap = std::fabs(r.row_max[n] - z[r.target[n]]);
    const double entropy = r.entropy[n];
    b.logit[n] = logit;
    b.nll[n] = 2 * logit * share + r.nll[n] * (sum + 8 * u) + share * 2 * u * gap +
               static_cast<double>(r.V) * kUnderflow;
    if (std::isinf(r.nll[n])) b.nll[n] = 0;
    b.lse[n] = logit + sum + u * (8 + 4 * std::fabs(r.lse[n]) + 2 * distance);
    b.entropy[n] = 2 * entropy * logit + 2 * logit * logit + (1 + entropy) * (sum + 8 * u) +
                   4 * u * distance * (1 + entropy);
    b.zbar[n] = weights * logit + weighted * sum + kUnderflow;
    b.zbar_centred[n] = 2 * weights * logit + centred * sum + kUnderflow;
  }
}

// The largest |g| that the rows' coefficients allow.
inline double largest_g(const Data& data, const reference::Result& r) {
  double largest_weight = data.class_weight.count == 0 ? 1 : 0;
  for (const double weight : data.class_weight.values()) {
    largest_weight = std::max(largest_weight, std::fabs(weight));
  }
  double largest = 0;
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0 || !std::isfinite(r.lse[n])) continue;
    const double g = std::fabs(stat_or(data.d_nll, n, 0)) + std::fabs(stat_or(data.d_lse, n, 0)) +
                     2 * std::fabs(stat_or(data.d_lse_squared, n, 0) * r.lse[n]) +
                     std::fabs(stat_or(data.d_entropy, n, 0)) * (1 + r.entropy[n]) +
                     std::fabs(stat_or(data.d_zbar, n, 0)) * largest_weight;
    largest = std::max(largest, g / row_temperature(data, n));
  }
  return largest;
}

// The error of a slope dz/da, of which a is known to `product`. Relative to the slope itself: with
// x = a / softcap it is 4 u / (1 + u)^2, u = e^(-2|x|), which an error of x changes by 2|tanh x| of
// itself at most, and a rounding of the exponent by 2|x| of it. |x| is at most log(4 / slope) / 2.
inline double slope_bound(const Data& data, const reference::Result& r, double product,
                          std::int64_t n, std::int64_t v) {
  const Problem& p = data.problem;
  const double slope = r.slope[n * r.V + v];
  if (!p.transform.softcap) return 0;
  if (slope == 0) return kUnderflow;
  const double u = rounding_units(p, r.compute_type).accumulator;
  const double x = std::log(4 / (slope * row_temperature(data, n))) / 2;
  return slope * (std::expm1(2 * product / *p.transform.softcap + 8 * u * x) + 16 * u) + kUnderflow;
}

// The error of g[n, v].
inline double g_bound(const Data& data, const reference::Result& r, const Bounds& b, std::int64_t n,
                      std::int64_t v) {
  const double u = rounding_units(data.problem, r.compute_type).accumulator;
  const double log_p = (r.z[n * r.V + v] - r.row_max[n]) - r.log_sum[n];
  const double p = std::exp(log_p);
  if (p == 0) return kUnderflow;
  const double d_nll = std::fabs(stat_or(data.d_nll, n, 0));
  const double d_squared = std::fabs(stat_or(data.d_lse_squared, n, 0));
  const double d_lse = std::fabs(stat_or(data.d_lse, n, 0)) + 2 * d_squared * std::fabs(r.lse[n]);
  const double d_entropy = std::fabs(stat_or(data.d_entropy, n, 0));
  const double d_zbar = std::fabs(stat_or(data.d_zbar, n, 0));
  const double weight = std::fabs(stat_or(data.class_weight, v, 1.0));

  const bool is_target = v == r.target[n];
  const double log_p_error = is_target
                                 ? b.nll[n] + 8 * u + 2 * u * r.nll[n]
                                 : 2 * b.logit[n] + gamma(u, r.V) + u * (8 + 2 * std::fabs(log_p));
  double error = p * log_p_error * d_lse + 4 * u * p * d_lse + 2 * p * d_squared * b.lse[n];
  error +=
      is_target ? d_nll * (p * b.nll[n] - 4 * u * std::expm1(-r.nll[n])) : d_nll * p * log_p_error;
  if (d_entropy != 0) {
    const double factor = std::fabs(log_p + r.entropy[n]);
    error +=
        d_entropy * p *
        (log_p_error * (1 + factor) + b.entropy[n] + 4 * u * (std::fabs(log_p) + r.entropy[n]));
  }
  return error + 4 * u * d_zbar * weight / static_cast<double>(r.V) + kUnderflow;
}

}  // namespace detail

inline Bounds bounds(const Data& data, const reference::Result& r) {
  using namespace detail;
  const Problem& p = data.problem;
  const auto [u, u_g, u_inputs] = rounding_units(p, r.compute_type);
  const double lost = r.compute_type == DType::f16 ? kF16Underflow * largest_g(data, r) : 0;
  Bounds b;
  for (auto* row : {&b.logit, &b.nll, &b.lse, &b.entropy, &b.zbar, &b.zbar_centred})
    row->assign(r.N, 0);
  b.de.assign(r.de.size(), 0);
  b.dc.assign(r.dc.size(), 0);
  b.dbias.assign(r.dbias.size(), 0);
  std::vector<double> de_squares(r.de.size(), 0), dc_squares(r.dc.size(), 0);

  const std::vector<double> product = product_bounds(data, r);
  row_bounds(data, r, product, b);
  const double scale = std::fabs(p.transform.logit_scale);
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    const std::int64_t de_row = reference::position_of_row(p, n) * r.D;
    for (std::int64_t v = 0; v < r.V; ++v) {
      const std::int64_t i = n * r.V + v;
      const double da = std::fabs(r.g[i] * r.slope[i]);
      const double cap_error = slope_bound(data, r, product[n], n, v);
      const double exact_g = g_bound(data, r, b, n, v) * r.slope[i] +
                             std::fabs(r.g[i]) * (cap_error + 4 * u * r.slope[i]) + lost +
                             u_inputs * da;
      const double rounding = u_g * da;
      const double de_error = exact_g + kRoundingsOfG * rounding + gamma(u, r.V) * da;
      const double dc_error = exact_g + kRoundingsOfG * rounding + gamma(u, r.N) * da;
      b.dbias[v] += dc_error;
      for (std::int64_t d = 0; d < r.D; ++d) {
        const double e = scale * std::fabs(r.e[n * r.D + d]);
        const double c = scale * std::fabs(r.c[v * r.D + d]);
        b.de[de_row + d] += de_error * c;
        b.dc[v * r.D + d] += dc_error * e;
        de_squares[de_row + d] += kRoundingsOfG * rounding * rounding * c * c;
        dc_squares[v * r.D + d] += kRoundingsOfG * rounding * rounding * e * e;
      }
    }
  }

  const auto close = [](std::vector<double>& bound, const std::vector<double>& value, DType type,
                        const std::vector<double>* squares) {
    const double u_out = reference::unit_roundoff(type);
    const double tiny = std::max(reference::smallest(type), kUnderflow);
    double total = 0;
    for (std::size_t i = 0; i < bound.size(); ++i) {
      const double rounding = u_out * std::fabs(value[i]);
      bound[i] += 2 * rounding + tiny;
      if (squares != nullptr)
        total += kMeanSquareOfRounding * ((*squares)[i] + rounding * rounding);
    }
    return bound.empty() ? 0.0 : std::sqrt(total / static_cast<double>(bound.size()));
  };
  b.de_rms = close(b.de, r.de, de_type(p), &de_squares);
  b.dc_rms = close(b.dc, r.dc, dc_type(p), &dc_squares);
  close(b.dbias, r.dbias, dbias_type(p), nullptr);
  return b;
}

// The first element outside its bound, in words; empty where all are inside. Infinities and NaNs
// must be where the reference has them.
inline std::string outside(const char* what, const std::vector<double>& got,
                           const std::vector<double>& want, const std::vector<double>& bound) {
  if (got.size() != want.size()) return std::string(what) + ": sizes differ";
  std::size_t worst = 0;
  double worst_ratio = 0;
  std::size_t count = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    double ratio = 0;
    if (std::isfinite(want[i]) && std::isfinite(got[i])) {
      const double error = std::fabs(got[i] - want[i]);
      ratio = error == 0 ? 0 : error / bound[i];
    } else if (!(std::isnan(want[i]) && std::isnan(got[i])) && !(want[i] == got[i])) {
      ratio = std::numeric_limits<double>::infinity();
    }
    if (ratio > 1) ++count;
    if (ratio > worst_ratio) {
      worst_ratio = ratio;
      worst = i;
    }
  }
  if (count == 0) return "";
  return std::string(what) + ": " + std::to_string(count) + " of " + std::to_string(got.size()) +
         " outside, worst at " + std::to_string(worst) + ": got " + std::to_string(got[worst]) +
         ", want " + std::to_string(want[worst]) +
         ", error / bound = " + std::to_string(worst_ratio);
}

inline double root_mean_square_error(const std::vector<double>& got,
                                     const std::vector<double>& want) {
  double squares = 0;
  for (std::size_t i = 0; i < got.size(); ++i) squares += (got[i] - want[i]) * (got[i] - want[i]);
  return got.empty() ? 0.0 : std::sqrt(squares / static_cast<double>(got.size()));
}

}  // namespace cutloss::test
