// Losses over logits on the host: a thread takes a row at a time, in segments that stay in its L1
// cache, with the row work of the CPU engine.
#include "core/logits_loss.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "core/logit_math.h"
#include "core/loss_terms.h"
#include "core/validate.h"
#include "cpu/convert.h"
#include "cpu/row_ops.h"

namespace cutloss {
namespace {

using namespace cpu;

// Columns that are converted and worked on at a time. Their sums are joined in this order, whatever
// the number of threads.
constexpr std::int64_t kSegment = 2048;

template <class T>
class LogitRows {
 public:
  LogitRows(const LogitsProblem& p, const LogitsArgs& args)
      : p_(p), args_(args), predicted_(p.length - p.shift) {}

  // Before anything is written.
  void check() const {
    for (std::int64_t n = 0; n < row_count(p_); ++n) {
      const std::int64_t target = target_of(n);
      if (target == p_.ignore_index) continue;
      const Position at{n / predicted_, n % predicted_ + p_.shift};
      check_target(target, p_.V, p_.ignore_index, at);
      if (!p_.has_row_temperature) continue;
      const double own = static_cast<const T*>(args_.temperature)[n];
      check_row_temperature(own, own * p_.temperature, stat_type_of(p_), at);
    }
  }

  bool counts(std::int64_t n) const { return target_of(n) != p_.ignore_index; }

  // A position of a sequence, whether it is a row or predicts nothing.
  void do_position(std::int64_t position, Passes passes) const {
    const std::int64_t sequence = position / p_.length, at = position % p_.length;
    const std::int64_t n = sequence * predicted_ + at;
    if (at >= predicted_ || !counts(n)) {
      if (passes.forward && at < predicted_) write(n, {0, 0, 0, 0, 0, 0, 0, -1});
      if (passes.backward) clear(sequence, at);
      return;
    }
    if (passes.forward) make_statistics(sequence, at, n);
    if (passes.backward) make_gradient(sequence, at, n);
  }

 private:
  using Segment = std::array<T, kSegment>;

  std::int64_t target_of(std::int64_t n) const {
    const std::int64_t i = n / predicted_ * p_.length + n % predicted_ + p_.shift;
    return p_.target_type == IndexType::i64 ? static_cast<const std::int64_t*>(args_.targets)[i]
                                            : static_cast<const std::int32_t*>(args_.targets)[i];
  }

  Transform<T> transform_of(std::int64_t n) const {
    const double own = p_.has_row_temperature ? static_cast<const T*>(args_.temperature)[n] : 1.0;
    Transform<T> transform;
    transform.softcap = static_cast<T>(folded_softcap(p_));
    transform.inv_temperature = static_cast<T>(p_.logit_scale / (own * p_.temperature));
    return transform;
  }

  const void* logits(std::int64_t sequence, std::int64_t at, std::int64_t column) const {
    return cpu::at(args_.logits, p_.type,
                   sequence * p_.sequence_stride + at * p_.row_stride + column);
  }
  void* gradient(std::int64_t sequence, std::int64_t at, std::int64_t column) const {
    return cpu::at(args_.gradient, p_.type,
                   sequence * p_.gradient_sequence_stride + at * p_.gradient_row_stride + column);
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
    row.entropy = p_.wants_entropy;
    row.argmax = p_.wants_argmax;
    row.zbar = p_.wants_zbar;
    for (std::int64_t v = 0; v < p_.V; v += kSegment) {
      row.first_column = v;
      row.columns = std::min(kSegment, p_.V - v);
      row.class_weight = class_weight(v);
      convert(p_.type, logits(sequence, at, v), stat_type_of(p_), z.data(), row.columns);
      row_statistics(row, state);
    }
    const T weight = args_.class_weight == nullptr ? T(1) : *class_weight(row.target);
    write(n, close(state, row.target, weight, p_.V));
  }

  void make_gradient(std::int64_t sequence, std::int64_t at, std::int64_t n) const {
    alignas(64) Segment z;
    const Transform<T> transform = transform_of(n);
    const std::int64_t target = target_of(n);
    const auto read = [n](const void* array) { return static_cast<const T*>(array)[n]; };
    const T nll = read(args_.rows.nll), row_max = read(args_.rows.row_max);
    const T log_sum = read(args_.rows.log_sum);
    const RowUpstream<T> up = row_upstream<T>(args_.upstream, n, row_max + log_sum);
    GradientRow<T> row{};
    RowCoefficients<T>& k = row.coefficients;
    k = row_coefficients(up, nll, row_max, log_sum, p_.V);
    if (k.d_entropy != T(0)) k.entropy = read(args_.rows.entropy);
    k.softcap = transform.softcap;
    k.inv_temperature = transform.inv_temperature;
    const T weight = args_.class_weight == nullptr ? T(1) : *class_weight(target);
    row.target_g = target_gradient(k, nll, up.d_nll, up.d_lse, weight);
    for (std::int64_t v = 0; v < p_.V; v += kSegment) {
      row.columns = std::min(kSegment, p_.V - v);
      row.class_weight = class_weight(v);
      const bool here = target >= v && target < v + row.columns;
      row.target = here ? target - v : -1;
      convert(p_.type, logits(sequence, at, v), stat_type_of(p_), z.data(), row.columns);
      store_gradient(row, z.data(), transform, gradient(sequence, at, v));
    }
  }

  void store_gradient(const GradientRow<T>& row, T* z, const Transform<T>& transform,
                      void* g) const {
    if constexpr (std::is_same_v<T, float>) {
      if (p_.type == DType::bf16) {
        return row_gradient_bf16(row, z, &transform, static_cast<std::uint16_t*>(g));
      }
      if (p_.type == DType::f16) {
        row_gradient(row, z, &transform, z);
        return convert(DType::f32, z, DType::f16, g, row.columns);
      }
    }
    row_gradient(row, z, &transform, static_cast<T*>(g));
  }

  void clear(std::int64_t sequence, std::int64_t at) const {
    std::memset(gradient(sequence, at, 0), 0, static_cast<std::size_t>(p_.V * size_of(p_.type)));
  }

  // What is not wanted is not written, even where there is room for it.
  void write(std::int64_t n, const RowResult<T>& result) const {
    const auto put = [n](void* array, T value) {
      if (array != nullptr) static_cast<T*>(array)[n] = value;
    };
    const RowOutputs& out = args_.rows;
    put(out.nll, result.nll);
    put(out.lse, result.lse);
    put(out.row_max, result.row_max);
    put(out.log_sum, result.log_sum);
    if (p_.wants_entropy) put(out.entropy, result.entropy);
    if (p_.wants_zbar) put(out.zbar, result.zbar);
    if (p_.wants_zbar) put(out.zbar_centred, result.zbar_centred);
    if (p_.wants_argmax) out.argmax[n] = result.argmax;
  }

  const LogitsProblem& p_;
  const LogitsArgs& args_;
  const std::int64_t predicted_;  // rows of a sequence that predict a target
};

template <class T>
void run(const LogitsProblem& p, const LogitsArgs& args, Passes passes) {
  const LogitRows<T> rows(p, args);
  rows.check();
  const std::int64_t positions = p.sequences * p.length;
  // Ignored rows are quick, so what a thread takes is not settled beforehand.
  const std::int64_t at_once = std::max<std::int64_t>(1, 8 * kSegment / p.V);
#pragma omp parallel for schedule(dynamic, at_once)
  for (std::int64_t i = 0; i < positions; ++i) rows.do_position(i, passes);
}

template <class T>
void sum(const LogitsProblem& p, const LogitsArgs& args, void* loss, const bool* undefined) {
  const LogitRows<T> rows(p, args);
  const auto counts = [&](std::int64_t n) { return rows.counts(n); };
  *static_cast<T*>(loss) =
      weighted_sum<T>(row_count(p), counts, args.rows, args.upstream, undefined);
}

}  // namespace

void cpu_logits(const LogitsProblem& p, const LogitsArgs& args, Passes passes) {
  p.type == DType::f64 ? run<double>(p, args, passes) : run<float>(p, args, passes);
}

void cpu_weighted_loss(const LogitsProblem& p, const LogitsArgs& args, void* loss,
                       const bool* undefined) {
  p.type == DType::f64 ? sum<double>(p, args, loss, undefined)
                       : sum<float>(p, args, loss, undefined);
}

}  // namespace cutloss
