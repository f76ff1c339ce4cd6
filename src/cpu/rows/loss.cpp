// The coefficients of a loss, and its sum, made on the host.
#include "core/loss_terms.h"

#include "core/dtype.h"
#include "core/row_map.h"
#include "cpu/device_calls.h"

namespace cutloss::cpu {
namespace {

template <class T>
void terms_of(const LossRows& given, const Weighting& w, const void* targets,
              const LossTerms& terms) {
  const auto* token_weight = static_cast<const T*>(w.token_weight);
  const auto* class_weight = static_cast<const T*>(w.class_weight);
  const RowMap<std::int64_t> map = row_map<std::int64_t>(given.rows);
  const std::int64_t rows = row_count(given.rows), V = given.classes;
  const auto weight_of = [&](std::int64_t n) {
    const std::int64_t i = map.target(n);
    return row_weight<T>(target_at(targets, given.rows.target_type, i), given.rows.ignore_index, V,
                         token_weight == nullptr ? nullptr : token_weight + i, class_weight);
  };
  WeightSums sums;
  if (w.mean) {
    for (std::int64_t n = 0; n < rows; ++n) {
      const RowWeight<T> weight = weight_of(n);
      sums.token += static_cast<double>(weight.token);
      sums.weighted += static_cast<double>(weight.weighted);
    }
  }
  if (w.label_smoothing > 0 && class_weight != nullptr) {
    for (std::int64_t v = 0; v < V; ++v) sums.classes += static_cast<double>(class_weight[v]);
  }
  *terms.undefined = is_undefined(w.mean, sums);
  const auto scales =
      term_scales<T>(w.mean, w.label_smoothing, w.z_loss, class_weight != nullptr, V, sums);
  const auto write = [](void* array, std::int64_t n, T value) {
    if (array != nullptr) static_cast<T*>(array)[n] = value;
  };
  for (std::int64_t n = 0; n < rows; ++n) {
    const RowTerms<T> row = row_terms(weight_of(n), scales);
    write(terms.nll, n, row.nll);
    write(terms.lse, n, row.lse);
    write(terms.lse_squared, n, row.lse_squared);
    write(terms.zbar, n, row.zbar);
  }
}

template <class T>
void sum_of(const LossSum& sum, void* loss) {
  const Rows& rows = sum.rows.rows;
  const RowMap<std::int64_t> map = row_map<std::int64_t>(rows);
  const auto counts = [&](std::int64_t n) {
    return target_at(sum.targets, rows.target_type, map.target(n)) != rows.ignore_index;
  };
  *static_cast<T*>(loss) =
      weighted_sum<T>(row_count(rows), counts, sum.out, sum.upstream, sum.undefined);
}

}  // namespace

void loss_terms(const LossRows& rows, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* /*stream*/) {
  for_stat(rows.type, [&]<class T>(T*) { terms_of<T>(rows, weighting, targets, terms); });
}

void sum_loss(const LossSum& sum, void* loss, void* /*stream*/) {
  for_stat(sum.rows.type, [&]<class T>(T*) { sum_of<T>(sum, loss); });
}

}  // namespace cutloss::cpu
