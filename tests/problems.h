// The problems that every engine is tested on: sizes, dtypes, options, kinds of logits, and the
// data for them. One row here reaches every engine and schedule.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"
#include "cutloss/cutloss.h"
#include "reference/number.h"
#include "reference/reference.h"

namespace cutloss::test {

enum class LogitKind {
  random,     // standard deviation about 1.5
  peaked,     // one logit about 30 above the others: the target's in every other row
  flat,       // all logits of a row equal
  offset,     // random, with 1e4 added to all
  saturated,  // each about `saturation` softcaps from 0, a quarter of them above it
};

struct Types {
  const char* name;
  DType e, c, bias, compute;
};

// bf16_autocast: parameters and activations in fp32, products in bf16. f32_mixed: the other way.
inline constexpr Types kTypes[] = {
    {"f32", DType::f32, DType::f32, DType::f32, DType::f32},
    {"bf16", DType::bf16, DType::bf16, DType::bf16, DType::bf16},
    {"f64", DType::f64, DType::f64, DType::f64, DType::f64},
    {"f16", DType::f16, DType::f16, DType::f16, DType::f16},
    {"bf16_autocast", DType::f32, DType::f32, DType::f32, DType::bf16},
    {"bf16_half_autocast", DType::bf16, DType::f32, DType::f32, DType::bf16},
    {"f32_mixed", DType::bf16, DType::f16, DType::f32, DType::f32},
};

struct Case {
  std::string name;
  Problem problem;
  LogitKind logits = LogitKind::random;
  double saturation = 0;
  double ignored = 0.2;             // share of ignored targets
  bool lse_gradient = false;        // d_lse and d_lse_squared are given
  std::int64_t extra_e_stride = 0;  // elements between rows of E
  std::int64_t extra_c_stride = 0;  // elements between rows of C
  std::int64_t extra_sequence_stride = 0;
  unsigned seed = 1;
};

inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

inline Case with_size(std::int64_t sequences, std::int64_t length, std::int64_t V, std::int64_t D,
                      std::int64_t shift = 0) {
  Case c;
  c.problem.rows.sequences = sequences;
  c.problem.rows.length = length;
  classes_of(c.problem).count = V;
  head_of(c.problem).D = D;
  c.problem.rows.shift = shift;
  c.problem.wanted.de.wanted = c.problem.wanted.dc.wanted = true;
  c.name = std::to_string(sequences) + "x" + std::to_string(length) + "_V" + std::to_string(V) +
           "_D" + std::to_string(D) + (shift != 0 ? "_shift" + std::to_string(shift) : "");
  return c;
}

inline void set_types(Problem& problem, const Types& types) {
  Head& head = head_of(problem);
  head.e_type = types.e;
  head.c_type = types.c;
  head.bias_type = types.bias;
  problem.compute_type = types.compute;
  // Where a gradient is asked for in another dtype, it is that of the sums.
  for (GradientWanted* gradient : {&problem.wanted.de, &problem.wanted.dc, &problem.wanted.dbias}) {
    if (gradient->type) gradient->type = reference::stat_type(problem);
  }
}

inline DType de_type(const Problem& p) { return p.wanted.de.type.value_or(head_of(p).e_type); }
inline DType dc_type(const Problem& p) { return p.wanted.dc.type.value_or(head_of(p).c_type); }
inline DType dbias_type(const Problem& p) {
  return p.wanted.dbias.type.value_or(head_of(p).bias_type);
}

// What lies in a gradient that is added to.
inline double added_to(std::int64_t index) { return 0.25 * static_cast<double>(index % 7) - 0.5; }

struct Option {
  const char* name;
  void (*apply)(Case&);
};

inline void add_everything(Case& c) {
  Problem& p = c.problem;
  head_of(p).has_bias = p.wanted.dbias.wanted = true;
  p.transform.softcap = 4.0;
  p.transform.logit_scale = 0.75;
  p.transform.temperature = 1.25;
  p.rows.has_temperature = true;
  p.has_class_weight = true;
  p.wanted.entropy = p.wanted.zbar = p.wanted.argmax = true;
  p.upstream.entropy = p.upstream.zbar = true;
  c.lse_gradient = true;
}

inline constexpr Option kOptions[] = {
    {"plain", [](Case&) {}},
    {"argmax", [](Case& c) { c.problem.wanted.argmax = true; }},
    {"bias", [](Case& c) { head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = true; }},
    {"bias_frozen", [](Case& c) { head_of(c.problem).has_bias = true; }},
    {"softcap", [](Case& c) { c.problem.transform.softcap = 2.0; }},
    {"scale", [](Case& c) { c.problem.transform.logit_scale = -0.6; }},
    {"temperature", [](Case& c) { c.problem.transform.temperature = 0.7; }},
    {"row_temperature", [](Case& c) { c.problem.rows.has_temperature = true; }},
    {"lse", [](Case& c) { c.lse_gradient = true; }},
    {"entropy", [](Case& c) { c.problem.wanted.entropy = c.problem.upstream.entropy = true; }},
    {"zbar", [](Case& c) { c.problem.wanted.zbar = c.problem.upstream.zbar = true; }},
    {"weighted_zbar",
     [](Case& c) {
       c.problem.wanted.zbar = c.problem.upstream.zbar = c.problem.has_class_weight = true;
     }},
    {"entropy_only_output", [](Case& c) { c.problem.wanted.entropy = true; }},
    {"only_de", [](Case& c) { c.problem.wanted.dc.wanted = false; }},
    {"only_dc", [](Case& c) { c.problem.wanted.de.wanted = false; }},
    {"only_dbias",
     [](Case& c) {
       head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = true;
       c.problem.wanted.de.wanted = c.problem.wanted.dc.wanted = false;
     }},
    {"de_dbias",
     [](Case& c) {
       head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = true;
       c.problem.wanted.dc.wanted = false;
     }},
    {"i32_targets", [](Case& c) { c.problem.rows.target_type = IndexType::i32; }},
    {"ignore_index_0", [](Case& c) { c.problem.rows.ignore_index = 0; }},
    {"none_ignored", [](Case& c) { c.ignored = 0; }},
    {"all_ignored", [](Case& c) { c.ignored = 1; }},
    {"strides",
     [](Case& c) {
       c.extra_e_stride = 3;
       c.extra_c_stride = 5;
       c.extra_sequence_stride = 7;
     }},
    {"everything", add_everything},
};

// Gradients in the dtype of their sums, and added to what is there.
inline constexpr Option kGradientOptions[] = {
    {"gradients_of_the_sums_type",
     [](Case& c) {
       Wanted& wanted = c.problem.wanted;
       head_of(c.problem).has_bias = wanted.dbias.wanted = true;
       wanted.de.type = wanted.dc.type = wanted.dbias.type = DType::f32;
     }},
    {"dc_and_dbias_added",
     [](Case& c) {
       Wanted& wanted = c.problem.wanted;
       head_of(c.problem).has_bias = wanted.dbias.wanted = true;
       wanted.dc.type = wanted.dbias.type = DType::f32;
       wanted.dc.add = wanted.dbias.add = true;
     }},
    {"added_by_no_row",
     [](Case& c) {
       Wanted& wanted = c.problem.wanted;
       head_of(c.problem).has_bias = wanted.dbias.wanted = true;
       wanted.dc.type = wanted.dbias.type = DType::f32;
       wanted.dc.add = wanted.dbias.add = true;
       c.ignored = 1;
     }},
};

// Logits before the softcap that lie so many softcaps from 0, all of a row's: what their gradient
// is then depends on slopes of 4 e^(-2 saturation) alone. With the options that take other ways to
// it: kept as exponentials, kept as they are, made again.
inline std::vector<Case> saturated_cases(const Case& size) {
  const Option options[] = {
      {"softcap", [](Case& c) { c.problem.transform.softcap = 2.0; }},
      {"softcap_bias_temperature",
       [](Case& c) {
         c.problem.transform.softcap = 3.0;
         head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted =
             c.problem.rows.has_temperature = true;
         c.problem.transform.logit_scale = -0.6;
         c.lse_gradient = true;
       }},
      {"softcap_zbar",
       [](Case& c) {
         c.problem.transform.softcap = 2.0;
         c.problem.wanted.zbar = c.problem.upstream.zbar = true;
       }},
      {"everything", add_everything},
  };
  std::vector<Case> cases;
  for (const double saturation : {3.0, 6.0, 10.0, 20.0}) {
    for (const Option& option : options) {
      Case c = size;
      option.apply(c);
      c.logits = LogitKind::saturated;
      c.saturation = saturation;
      c.name = std::string(option.name) + "_" + std::to_string(static_cast<int>(saturation));
      cases.push_back(c);
    }
  }
  return cases;
}

// Sizes that break tiles: 1, primes, and one below and above the multiples that engines use.
inline std::vector<Case> size_cases() {
  return {with_size(1, 1, 1, 1),       with_size(1, 1, 7, 3),          with_size(1, 5, 1, 4),
          with_size(1, 2, 17, 1),      with_size(1, 16, 64, 16),       with_size(1, 15, 63, 15),
          with_size(1, 17, 65, 17),    with_size(1, 37, 101, 13),      with_size(1, 63, 511, 33),
          with_size(1, 64, 512, 32),   with_size(1, 65, 513, 31),      with_size(1, 127, 1023, 64),
          with_size(1, 129, 1025, 65), with_size(1, 1, 10007, 8),      with_size(1, 2100, 139, 6),
          with_size(1, 1031, 257, 8),  with_size(1, 300, 2053, 48),    with_size(3, 11, 97, 8, 2),
          with_size(4, 2, 33, 6, 1),   with_size(2, 130, 1100, 24, 3), with_size(7, 1, 29, 5)};
}

// What one case is run on.
struct Data {
  Problem problem;  // with strides
  Array e, c, bias, temperature, class_weight;
  Buffer targets;
  Array d_nll, d_lse, d_lse_squared, d_entropy, d_zbar;  // count 0 where not given

  Inputs inputs(Device device = Device::cpu) const {
    Inputs in;
    in.e = e.on(device);
    in.c = c.on(device);
    in.targets = targets.on(device);
    if (head_of(problem).has_bias) in.bias = bias.on(device);
    if (problem.rows.has_temperature) in.temperature = temperature.on(device);
    if (problem.has_class_weight) in.class_weight = class_weight.on(device);
    return in;
  }

  RowGradients upstream(Device device = Device::cpu) const {
    const auto given = [&](const Array& a) { return a.count != 0 ? a.on(device) : nullptr; };
    return {given(d_nll), given(d_lse), given(d_lse_squared), given(d_entropy), given(d_zbar)};
  }

  reference::RowGradients64 upstream64() const {
    return {d_nll.values(), d_lse.values(), d_lse_squared.values(), d_entropy.values(),
            d_zbar.values()};
  }

  std::int64_t target(std::int64_t position) const {
    if (problem.rows.target_type == IndexType::i32) {
      return reinterpret_cast<const std::int32_t*>(targets.data())[position];
    }
    return reinterpret_cast<const std::int64_t*>(targets.data())[position];
  }

  void set_target(std::int64_t position, std::int64_t value) {
    if (problem.rows.target_type == IndexType::i32) {
      reinterpret_cast<std::int32_t*>(targets.data())[position] = static_cast<std::int32_t>(value);
    } else {
      reinterpret_cast<std::int64_t*>(targets.data())[position] = value;
    }
  }

  std::int64_t e_offset(std::int64_t position) const {
    return position / problem.rows.length * head_of(problem).e_sequence_stride +
           position % problem.rows.length * head_of(problem).e_row_stride;
  }

  bool counts(std::int64_t row) const {
    return target(reference::position_of_row(problem, row) + problem.rows.shift) !=
           problem.rows.ignore_index;
  }
};

namespace detail {

inline void fill_targets(const Case& c, Data& data, std::mt19937_64& random) {
  const Problem& p = data.problem;
  const std::int64_t positions = p.rows.sequences * p.rows.length;
  const std::int64_t bytes = p.rows.target_type == IndexType::i32 ? 4 : 8;
  data.targets = Buffer(positions * bytes);
  std::uniform_int_distribution<std::int64_t> any(0, classes_of(p).count - 1);
  std::uniform_real_distribution<double> unit(0, 1);
  for (std::int64_t i = 0; i < positions; ++i) {
    // The first row always counts, so that the smallest problems are not empty.
    const double share = i == p.rows.shift && c.ignored < 1 ? 0 : c.ignored;
    data.set_target(i, unit(random) < share ? p.rows.ignore_index : any(random));
  }
}

inline void fill_classifier(const Case& c, Data& data, std::mt19937_64& random) {
  const Problem& p = data.problem;
  const Head& head = head_of(p);
  std::normal_distribution<double> normal;
  const double size = 1.5 / std::sqrt(static_cast<double>(head.D));
  // Between the rows of C the buffer keeps its NaNs: reading them would show.
  data.c = Array(head.c_type, head.classes.count * head.c_row_stride);
  for (std::int64_t v = 0; v < head.classes.count; ++v) {
    for (std::int64_t d = 0; d < head.D; ++d) {
      double value = size * normal(random);
      if (c.logits == LogitKind::flat && v > 0) value = data.c.get(d);
      if (c.logits == LogitKind::offset && d == 0) value = 100;
      if (c.logits == LogitKind::saturated) {
        // The first element of every embedding is 1, the others are small.
        const double unit = p.transform.softcap.value() / p.transform.logit_scale;
        value *= 0.1 * unit;
        if (d == 0) value = (v % 4 == 0 ? 1 : -1) * unit * c.saturation * (1 + 0.002 * (v % 17));
      }
      data.c.set(v * head.c_row_stride + d, value);
    }
  }
}

inline void fill_embeddings(const Case& c, Data& data, std::mt19937_64& random) {
  const Problem& p = data.problem;
  const Head& head = head_of(p);
  std::normal_distribution<double> normal;
  data.e = Array(head.e_type, p.rows.sequences * head.e_sequence_stride);
  for (std::int64_t row = 0; row < row_count(p); ++row) {
    // E of rows that do not count stays NaN: it must have no effect.
    if (!data.counts(row)) continue;
    const std::int64_t position = reference::position_of_row(p, row);
    const std::int64_t offset = data.e_offset(position);
    std::int64_t top = data.target(position + p.rows.shift);
    if (row % 2 == 1) top = (top + head.classes.count / 2) % head.classes.count;
    double norm = 0.25;
    for (std::int64_t d = 0; d < head.D; ++d) {
      norm = std::max(norm, std::fabs(data.c.get(top * head.c_row_stride + d)));
    }
    double squares = 0;
    for (std::int64_t d = 0; d < head.D; ++d) {
      const double ratio = data.c.get(top * head.c_row_stride + d) / norm;
      squares += ratio * ratio;
    }
    norm *= norm * std::max(squares, 1.0);
    for (std::int64_t d = 0; d < head.D; ++d) {
      double value = normal(random);
      if (c.logits == LogitKind::peaked) {
        value = 0.1 * value + 30 * data.c.get(top * head.c_row_stride + d) / norm;
      }
      if (c.logits == LogitKind::offset && d == 0) value = 100;
      if (c.logits == LogitKind::saturated) value = d == 0 ? 1 : 0.3 * value;
      data.e.set(offset + d, value);
    }
  }
}

inline Array random_array(DType type, std::int64_t count, double low, double high,
                          std::mt19937_64& random) {
  Array array(type, count);
  std::uniform_real_distribution<double> uniform(low, high);
  for (std::int64_t i = 0; i < count; ++i) array.set(i, uniform(random));
  return array;
}

}  // namespace detail

// The case's problem, with its strides.
inline Problem problem_of(const Case& c) {
  Problem p = c.problem;
  Head& head = head_of(p);
  head.e_row_stride = head.D + c.extra_e_stride;
  head.e_sequence_stride = p.rows.length * head.e_row_stride + c.extra_sequence_stride;
  head.c_row_stride = head.D + c.extra_c_stride;
  return p;
}

inline Data make_data(const Case& c) {
  std::mt19937_64 random(c.seed);
  Data data;
  Problem& p = data.problem;
  const Head& head = head_of(p);
  p = problem_of(c);

  detail::fill_targets(c, data, random);
  detail::fill_classifier(c, data, random);
  detail::fill_embeddings(c, data, random);

  const DType stat = reference::stat_type(p);
  const std::int64_t N = row_count(p);
  if (head.has_bias) {
    data.bias = detail::random_array(head.bias_type, head.classes.count, -1, 1, random);
  }
  if (head.has_bias && c.logits == LogitKind::flat) {
    for (std::int64_t v = 0; v < head.classes.count; ++v) data.bias.set(v, 0.25);
  }
  if (p.rows.has_temperature) data.temperature = detail::random_array(stat, N, 0.5, 2, random);
  if (p.has_class_weight) {
    data.class_weight = detail::random_array(stat, head.classes.count, 0, 2, random);
  }

  const auto coefficients = [&](double low, double high) {
    Array array = detail::random_array(stat, N, low, high, random);
    for (std::int64_t n = 0; n < N; ++n) {
      if (!data.counts(n)) array.set(n, std::nan(""));  // must not be read
    }
    return array;
  };
  data.d_nll = coefficients(0.1, 1);
  if (c.lse_gradient) {
    data.d_lse = coefficients(-0.5, 0.5);
    data.d_lse_squared = coefficients(-0.1, 0.1);
  }
  if (p.upstream.entropy) data.d_entropy = coefficients(-1, 1);
  if (p.upstream.zbar) data.d_zbar = coefficients(-1, 1);
  return data;
}

}  // namespace cutloss::test
