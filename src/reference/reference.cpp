#include "reference/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/number.h"

namespace cutloss::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Equal terms, as flat logits make them, err to one side: summed in fp64 they lose more digits than
// in an engine, which adds in several lanes. What fp64 results are compared with is summed wider.
using Sum = long double;

// A factor of 0 wins over an infinity, but not over a NaN.
double times(double factor, double value) {
  return factor == 0 && std::isinf(value) ? 0.0 : factor * value;
}

double at(const std::vector<double>& values, std::int64_t index) {
  return values.empty() ? 0.0 : values[index];
}

std::int64_t load_target(const Problem& problem, const Inputs& in, std::int64_t position) {
  if (problem.rows.target_type == IndexType::i32) {
    return static_cast<const std::int32_t*>(in.targets)[position];
  }
  return static_cast<const std::int64_t*>(in.targets)[position];
}

double operand(const Problem& problem, const void* array, DType type, std::int64_t index) {
  const double stored = load(array, type, index);
  return problem.compute_type == DType::bf16 ? rounded(stored, DType::bf16) : stored;
}

// How E, or logits, lie in memory. A stride of 0 means packed.
struct Matrix {
  std::int64_t columns, sequence_stride, row_stride;
};

Matrix matrix_of(const Head& head) { return {head.D, head.e_sequence_stride, head.e_row_stride}; }
Matrix matrix_of(const Logits& logits) {
  return {logits.classes.count, logits.sequence_stride, logits.row_stride};
}

std::int64_t offset_of_row(const Problem& problem, const Matrix& matrix, std::int64_t n) {
  const std::int64_t row_stride = matrix.row_stride != 0 ? matrix.row_stride : matrix.columns;
  const std::int64_t sequence_stride =
      matrix.sequence_stride != 0 ? matrix.sequence_stride : problem.rows.length * row_stride;
  const std::int64_t position = position_of_row(problem, n);
  return position / problem.rows.length * sequence_stride +
         position % problem.rows.length * row_stride;
}

void read_targets(const Problem& problem, const Inputs& in, Result& r) {
  for (std::int64_t n = 0; n < r.N; ++n) {
    const std::int64_t position = position_of_row(problem, n) + problem.rows.shift;
    const std::int64_t target = load_target(problem, in, position);
    if (target == problem.rows.ignore_index) continue;
    if (target < 0 || target >= classes_of(problem).count) {
      throw Error(ErrorCode::invalid_value, "target at position " + std::to_string(position) +
                                                " is " + std::to_string(target) + ", outside [0, " +
                                                std::to_string(classes_of(problem).count) + ")");
    }
    r.target[n] = target;
  }
}

void read_operands(const Problem& problem, const Inputs& in, Result& r) {
  const Head& head = head_of(problem);
  const std::int64_t D = head.D;
  const std::int64_t c_stride = head.c_row_stride != 0 ? head.c_row_stride : D;
  for (std::int64_t n = 0; n < r.N; ++n) {
    const std::int64_t offset = offset_of_row(problem, matrix_of(head), n);
    for (std::int64_t d = 0; d < D; ++d) {
      r.e[n * D + d] = operand(problem, in.e, head.e_type, offset + d);
    }
  }
  for (std::int64_t v = 0; v < head.classes.count; ++v) {
    for (std::int64_t d = 0; d < D; ++d) {
      r.c[v * D + d] = operand(problem, in.c, head.c_type, v * c_stride + d);
    }
  }
}

// z = transform(logit(n, v)) and slope = dz/da, where logit has logit_scale and bias in it.
template <class Logit>
void transform(const Problem& problem, const Inputs& in, Logit logit, Result& r) {
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    double temperature = problem.transform.temperature;
    if (problem.rows.has_temperature) {
      temperature *= load(in.temperature, stat_type(problem), n);
    }
    for (std::int64_t v = 0; v < r.V; ++v) {
      const double a = logit(n, v);
      double s = a;
      double slope = 1;
      if (problem.transform.softcap) {
        const double x = a / *problem.transform.softcap;
        s = *problem.transform.softcap * std::tanh(x);
        // Not 1 - tanh^2, which is 0 from |x| = 19 on.
        const double u = std::exp(-2 * std::fabs(x));
        slope = 4 * u / ((1 + u) * (1 + u));
      }
      r.z[n * r.V + v] = s / temperature;
      r.slope[n * r.V + v] = slope / temperature;
    }
  }
}

// Makes nll with the target left out of the sum: it is never negative, and loses no digit where it
// is small.
double nll_of(const double* z, std::int64_t V, std::int64_t target) {
  double max_other = -kInfinity;
  for (std::int64_t v = 0; v < V; ++v) {
    if (v != target && z[v] > max_other) max_other = z[v];
  }
  if (max_other == -kInfinity) return z[target] == -kInfinity ? kNaN : 0.0;
  Sum sum_other = 0;
  for (std::int64_t v = 0; v < V; ++v) {
    if (v != target) sum_other += std::exp(z[v] - max_other);
  }
  const double lead = max_other - z[target];
  if (lead <= 0) return static_cast<double>(std::log1p(sum_other * std::exp(Sum{lead})));
  return static_cast<double>(lead + std::log(sum_other + std::exp(Sum{-lead})));
}

void statistics(const Problem& problem, const Inputs& in, Result& r) {
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    const double* z = r.z.data() + n * r.V;
    std::int64_t best = 0;
    bool has_nan = false;
    for (std::int64_t v = 0; v < r.V; ++v) {
      if (z[v] > z[best]) best = v;
      if (std::isnan(z[v])) has_nan = true;
    }
    const double maximum = z[best];
    r.argmax[n] = best;
    if (has_nan || std::isinf(maximum)) {
      // There is no distribution where the logits hold a NaN or a +inf, or nothing but -inf.
      r.row_max[n] = maximum;
      r.lse[n] = has_nan ? kNaN : maximum;
      r.nll[n] = r.log_sum[n] = r.entropy[n] = r.zbar[n] = r.zbar_centred[n] = kNaN;
      continue;
    }
    Sum sum = 0;
    for (std::int64_t v = 0; v < r.V; ++v) sum += std::exp(z[v] - maximum);
    r.row_max[n] = maximum;
    r.log_sum[n] = static_cast<double>(std::log(sum));
    r.lse[n] = maximum + r.log_sum[n];
    r.nll[n] = nll_of(z, r.V, r.target[n]);
    Sum entropy = 0;
    Sum zbar = 0, centred = 0;
    for (std::int64_t v = 0; v < r.V; ++v) {
      const double log_p = (z[v] - maximum) - r.log_sum[n];
      entropy -= times(std::exp(log_p), log_p);
      const double weight =
          problem.has_class_weight ? load(in.class_weight, stat_type(problem), v) : 1.0;
      zbar += Sum{weight} * z[v];
      centred += Sum{weight} * (z[v] - maximum);
    }
    r.entropy[n] = static_cast<double>(entropy);
    r.zbar[n] = static_cast<double>(zbar / static_cast<Sum>(r.V));
    r.zbar_centred[n] = static_cast<double>(centred / static_cast<Sum>(r.V));
  }
}

// Makes g = dLoss/dz.
void logit_gradients(const Problem& problem, const Inputs& in, const RowGradients64& upstream,
                     Result& r) {
  for (std::int64_t n = 0; n < r.N; ++n) {
    const std::int64_t target = r.target[n];
    if (target < 0) continue;
    const double* z = r.z.data() + n * r.V;
    const double d_nll = at(upstream.d_nll, n);
    const double d_lse = at(upstream.d_lse, n) + times(at(upstream.d_lse_squared, n), 2 * r.lse[n]);
    const double d_entropy = at(upstream.d_entropy, n);
    const double d_zbar = at(upstream.d_zbar, n);
    for (std::int64_t v = 0; v < r.V; ++v) {
      const double log_p = (z[v] - r.row_max[n]) - r.log_sum[n];
      const double p = std::exp(log_p);
      double g = p * d_lse - d_entropy * times(p, log_p + r.entropy[n]);
      // At the target p - 1 = e^-nll - 1, formed so that a small difference keeps its digits.
      g += d_nll * (v == target ? std::expm1(-r.nll[n]) : p);
      const double weight =
          problem.has_class_weight ? load(in.class_weight, stat_type(problem), v) : 1.0;
      g += d_zbar * weight / static_cast<double>(r.V);
      r.g[n * r.V + v] = g;
    }
  }
}

// Makes dE, dC and dbias, with sums in T.
template <class T>
void products(const Problem& problem, Result& r) {
  std::vector<T> dc(r.dc.size(), 0), dbias(r.dbias.size(), 0);
  for (std::int64_t n = 0; n < r.N; ++n) {
    if (r.target[n] < 0) continue;
    std::vector<T> de(r.D, 0);
    for (std::int64_t v = 0; v < r.V; ++v) {
      const T da = T(r.g[n * r.V + v]) * r.slope[n * r.V + v];
      const T dot = da * problem.transform.logit_scale;
      for (std::int64_t d = 0; d < r.D; ++d) {
        de[d] += dot * r.c[v * r.D + d];
        dc[v * r.D + d] += dot * r.e[n * r.D + d];
      }
      dbias[v] += da;
    }
    std::copy(de.begin(), de.end(), r.de.begin() + position_of_row(problem, n) * r.D);
  }
  std::copy(dc.begin(), dc.end(), r.dc.begin());
  std::copy(dbias.begin(), dbias.end(), r.dbias.begin());
}

std::vector<double> load_rows(const void* array, DType type, std::int64_t count) {
  std::vector<double> values;
  if (array == nullptr) return values;
  values.resize(count);
  for (std::int64_t n = 0; n < count; ++n) values[n] = load(array, type, n);
  return values;
}

RowGradients64 load_upstream(const Problem& problem, const Args& args) {
  const DType type = stat_type(problem);
  const std::int64_t N = row_count(problem);
  const RowGradients& from = args.upstream;
  return {load_rows(from.d_nll, type, N), load_rows(from.d_lse, type, N),
          load_rows(from.d_lse_squared, type, N), load_rows(from.d_entropy, type, N),
          load_rows(from.d_zbar, type, N)};
}

void store_all(void* array, DType type, const std::vector<double>& values) {
  if (array == nullptr) return;
  for (std::size_t i = 0; i < values.size(); ++i) {
    store(array, type, static_cast<std::int64_t>(i), values[i]);
  }
}

Result empty_result(const Problem& problem, std::int64_t D) {
  Result r;
  r.N = row_count(problem);
  r.V = classes_of(problem).count;
  r.D = D;
  r.compute_type = D > 0 ? problem.compute_type : stat_type(problem);
  r.e.assign(r.N * r.D, 0);
  r.c.assign(r.V * r.D, 0);
  r.target.assign(r.N, -1);
  for (auto* matrix : {&r.z, &r.slope, &r.g}) matrix->assign(r.N * r.V, 0);
  for (auto* row : {&r.nll, &r.lse, &r.row_max, &r.log_sum, &r.entropy, &r.zbar, &r.zbar_centred}) {
    row->assign(r.N, 0);
  }
  r.argmax.assign(r.N, -1);
  r.de.assign(problem.rows.sequences * problem.rows.length * r.D, 0);
  r.dc.assign(r.V * r.D, 0);
  r.dbias.assign(r.V, 0);
  return r;
}

}  // namespace

std::int64_t position_of_row(const Problem& problem, std::int64_t row) {
  const std::int64_t per_sequence = problem.rows.length - problem.rows.shift;
  return row / per_sequence * problem.rows.length + row % per_sequence;
}

DType stat_type(const Problem& problem) {
  const auto* logits = std::get_if<Logits>(&problem.source);
  const DType type = logits != nullptr ? logits->type : problem.compute_type;
  return type == DType::f64 ? DType::f64 : DType::f32;
}

Result evaluate(const Problem& problem, const Inputs& in, const RowGradients64& upstream) {
  const Head& head = head_of(problem);
  Result r = empty_result(problem, head.D);
  read_targets(problem, in, r);
  read_operands(problem, in, r);
  const auto logit = [&](std::int64_t n, std::int64_t v) {
    double dot = 0;
    for (std::int64_t d = 0; d < r.D; ++d) dot += r.e[n * r.D + d] * r.c[v * r.D + d];
    const double bias = head.has_bias ? load(in.bias, head.bias_type, v) : 0.0;
    return problem.transform.logit_scale * dot + bias;
  };
  transform(problem, in, logit, r);
  statistics(problem, in, r);
  logit_gradients(problem, in, upstream, r);
  problem.compute_type == DType::f64 ? products<Sum>(problem, r) : products<double>(problem, r);
  return r;
}

Result evaluate_logits(const Problem& problem, const Inputs& in, const RowGradients64& upstream) {
  const Logits& logits = logits_of(problem);
  Result r = empty_result(problem, 0);
  read_targets(problem, in, r);
  const auto logit = [&](std::int64_t n, std::int64_t v) {
    const std::int64_t row = offset_of_row(problem, matrix_of(logits), n);
    return problem.transform.logit_scale * load(in.e, logits.type, row + v);
  };
  transform(problem, in, logit, r);
  statistics(problem, in, r);
  logit_gradients(problem, in, upstream, r);
  return r;
}

void forward(const Problem& problem, const Args& args) {
  const Result r = evaluate(problem, args.in);
  const DType type = stat_type(problem);
  store_all(args.rows.nll, type, r.nll);
  store_all(args.rows.lse, type, r.lse);
  store_all(args.rows.row_max, type, r.row_max);
  store_all(args.rows.log_sum, type, r.log_sum);
  if (problem.wanted.entropy) store_all(args.rows.entropy, type, r.entropy);
  if (problem.wanted.zbar) store_all(args.rows.zbar, type, r.zbar);
  if (problem.wanted.zbar) store_all(args.rows.zbar_centred, type, r.zbar_centred);
  if (problem.wanted.argmax) {
    for (std::int64_t n = 0; n < r.N; ++n) args.rows.argmax[n] = r.argmax[n];
  }
}

void backward(const Problem& problem, const Args& args) {
  const Head& head = head_of(problem);
  const Result r = evaluate(problem, args.in, load_upstream(problem, args));
  if (problem.wanted.de.wanted) store_all(args.gradients.de, head.e_type, r.de);
  if (problem.wanted.dc.wanted) store_all(args.gradients.dc, head.c_type, r.dc);
  if (problem.wanted.dbias.wanted) store_all(args.gradients.dbias, head.bias_type, r.dbias);
}

}  // namespace cutloss::reference
