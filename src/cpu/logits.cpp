// Losses over logits on the host: a thread takes a row at a time, in segments that stay in its L1
// cache, and does to them the row work of the CPU engine.
#include "cutloss/logits.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/dtype.h"
#include "core/folded_softcap.h"
#include "core/logit_math.h"
#include "core/loss_terms.h"
#include "core/row_map.h"
#include "core/row_outputs.h"
#include "core/validate.h"
#include "cpu/device_calls.h"
#include "cpu/rows/convert.h"
#include "cpu/rows/row_ops.h"

namespace cutloss {
namespace {

using namespace cpu;

// How many columns are converted and worked on at a time. Sums are joined segment by segment, so
// they do not depend on the number of threads.
constexpr std::int64_t kSegment = 2048;

template <class T>
class LogitRows {
 public:
  LogitRows(const Problem& p, const LogitsArgs& args)
      : p_(p), logits_(logits_of(p)), args_(args), map_(row_map<std::int64_t>(p.rows)) {}

  // Checks all targets and temperatures, before anything is written.
  void check() const {
    for (std::int64_t n = 0; n < row_count(p_); ++n) {
      const std::int64_t target = target_of(n);
      if (target == p_.rows.ignore_index) continue;
      const Position at{map_.sequence(n), map_.column(n) + map_.shift};
      check_target(target, logits_.classes.count, p_.rows.ignore_index, at);
      if (!p_.rows.has_temperature) continue;
      const double own = static_cast<const T*>(args_.temperature)[n];
      check_row_temperature(own, own * p_.transform.temperature, stat_type(p_), at);
    }
  }

  bool counts(std::int64_t n) const { return target_of(n) != p_.rows.ignore_index; }

  // Does the work of a position, which may be a row or predict nothing.
  void do_position(std::int64_t position, Pass pass) const {
    const std::int64_t sequence = position / p_.rows.length, at = position % p_.rows.length;
    const std::int64_t n = map_.row(sequence, at);
    if (at >= map_.predicted || !counts(n)) {
      if (makes_statistics(pass) && at < map_.predicted) write(n, {0, 0, 0, 0, 0, 0, 0, -1});
      if (makes_gradients(pass)) clear(sequence, at);
      return;
    }
    if (makes_statistics(pass)) make_statistics(sequence, at, n);
    if (makes_gradients(pass)) make_gradient(sequence, at, n);
  }

 private:
  using Segment = std::array<T, kSegment>;

  std::int64_t target_of(std::int64_t n) const {
    return target_at(args_.targets, p_.rows.target_type, map_.target(n));
  }

  RowTransform<T> transform_of(std::int64_t n) const {
    const double own = p_.rows.has_temperature ? static_cast<const T*>(args_.temperature)[n] : 1.0;
    RowTransform<T> transform;
    transform.softcap = static_cast<T>(folded_softcap(p_));
    transform.inv_temperature =
        static_cast<T>(p_.transform.logit_scale / (own * p_.transform.temperature));
    return transform;
  }

  const void* logits(std::int64_t sequence, std::int64_t at, std::int64_t column) const {
    return cutloss::at(args_.logits, logits_.type,
                       sequence * logits_.sequence_stride + at * logits_.row_stride + column);
  }
  void* gradient(std::int64_t sequence, std::int64_t at, std::int64_t column) const {
    return cutloss::at(
        args_.gradient, logits_.type,
        sequence * p_.wanted.dlogits_sequence_stride + at * p_.wanted.dlogits_row_stride + column);
  }
  const T* class_weight(std::int64_t column) const {
    const auto* all = static_cast<const T*>(args_.class_weight);
    return all == nullptr ? nullptr : all + column;
  }

  void make_statistics(std::int64_t sequence, std::int64_t at, std::int64_t n) const {
    alignas(64) Segment z;
    RowState<T> state;
    StatisticsRow<T> row{};
    row.z = z.data();
    row.target = target_of(n);
    row.transform = transform_of(n);
    row.entropy = p_.wanted.entropy;
    row.argmax = p_.wanted.argmax;
    row.zbar = p_.wanted.zbar;
    for (std::int64_t v = 0; v < logits_.classes.count; v += kSegment) {
      row.first_column = v;
      row.columns = std::min(kSegment, logits_.classes.count - v);
      row.class_weight = class_weight(v);
      convert(logits_.type, logits(sequence, at, v), stat_type(p_), z.data(), row.columns);
      row_ops<T>().statistics(row, state);
    }
    const T weight = args_.class_weight == nullptr ? T(1) : *class_weight(row.target);
    write(n, close(state, row.target, weight, logits_.classes.count));
  }

  void make_gradient(std::int64_t sequence, std::int64_t at, std::int64_t n) const {
    alignas(64) Segment z;
    const RowTransform<T> transform = transform_of(n);
    const std::int64_t target = target_of(n);
    const auto read = [n](const void* array) { return static_cast<const T*>(array)[n]; };
    const T nll = read(args_.rows.nll), row_max = read(args_.rows.row_max);
    const T log_sum = read(args_.rows.log_sum);
    const RowUpstream<T> up = row_upstream<T>(args_.upstream, n, row_max + log_sum);
    GradientRow<T> row{};
    RowCoefficients<T>& k = row.coefficients;
    k = row_coefficients(up, nll, row_max, log_sum, logits_.classes.count);
    if (k.d_entropy != T(0)) k.entropy = read(args_.rows.entropy);
    k.softcap = transform.softcap;
    k.inv_temperature = transform.inv_temperature;
    const T weight = args_.class_weight == nullptr ? T(1) : *class_weight(target);
    row.target_g = target_gradient(k, nll, up.d_nll, up.d_lse, weight);
    for (std::int64_t v = 0; v < logits_.classes.count; v += kSegment) {
      row.columns = std::min(kSegment, logits_.classes.count - v);
      row.class_weight = class_weight(v);
      const bool here = target >= v && target < v + row.columns;
      row.target = here ? target - v : -1;
      convert(logits_.type, logits(sequence, at, v), stat_type(p_), z.data(), row.columns);
      store_gradient(row, z.data(), transform, gradient(sequence, at, v));
    }
  }

  void store_gradient(const GradientRow<T>& row, T* z, const RowTransform<T>& transform,
                      void* g) const {
    const bool through_f32 = logits_.type == DType::f16;
    row_ops<T>().gradient(row, z, &transform, through_f32 ? DType::f32 : logits_.type,
                          through_f32 ? z : g);
    if (through_f32) convert(DType::f32, z, DType::f16, g, row.columns);
  }

  void clear(std::int64_t sequence, std::int64_t at) const {
    std::memset(gradient(sequence, at, 0), 0,
                static_cast<std::size_t>(logits_.classes.count * size_of(logits_.type)));
  }

  void write(std::int64_t n, const RowResult<T>& result) const {
    write_row(wanted_outputs(p_.wanted, args_.rows), n, result);
  }

  const Problem& p_;
  const Logits& logits_;
  const LogitsArgs& args_;
  const RowMap<std::int64_t> map_;
};

template <class T>
void run(const Problem& p, const LogitsArgs& args, Pass pass) {
  const LogitRows<T> rows(p, args);
  rows.check();
  const std::int64_t positions = p.rows.sequences * p.rows.length;
  // Ignored rows are quick, so the rows are not divided among the threads beforehand.
  const std::int64_t at_once = std::max<std::int64_t>(1, 8 * kSegment / classes_of(p).count);
#pragma omp parallel for schedule(dynamic, at_once)
  for (std::int64_t i = 0; i < positions; ++i) rows.do_position(i, pass);
}

}  // namespace

void cpu::logits(const Problem& p, const LogitsArgs& args, Pass pass) {
  logits_of(p).type == DType::f64 ? run<double>(p, args, pass) : run<float>(p, args, pass);
}

const DeviceCalls& cpu_calls() {
  static constexpr DeviceCalls calls{cpu::loss_terms,   cpu::sum_loss, cpu::close_rows,
                                     cpu::empty_states, cpu::logits,   nullptr};
  return calls;
}

}  // namespace cutloss
