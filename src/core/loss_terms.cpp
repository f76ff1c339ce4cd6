// loss_terms of the public interface: its checks, and the host's loop.
#include "core/loss_terms.h"

#include <cmath>

#include "core/dtype.h"
#include "core/row_map.h"
#include "core/text.h"
#include "core/validate.h"

namespace cutloss {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_value, "loss_terms: " + message);
}

void check(const LossRows& rows, const Weighting& w, const void* targets, const LossTerms& terms) {
  if (rows.classes < 1) refuse(text("V must be >= 1, got ", rows.classes));
  check_product("N x V", rows.rows.sequences * rows.rows.length, rows.classes);
  if (rows.type != DType::f32 && rows.type != DType::f64) {
    throw Error(ErrorCode::invalid_type,
                text("loss_terms: type must be f32 or f64, the dtypes of per-row numbers, got ",
                     name(rows.type)));
  }
  if (!(w.label_smoothing >= 0 && w.label_smoothing <= 1)) {
    refuse(text("label_smoothing must be in [0, 1], got ", w.label_smoothing));
  }
  if (!(w.z_loss >= 0 && std::isfinite(w.z_loss))) {
    refuse(text("z_loss must be finite and >= 0, got ", w.z_loss));
  }
  if (terms.undefined == nullptr) refuse("terms.undefined is null");
  const auto agrees = [&](const void* pointer, bool wanted, const char* what, const char* why) {
    if (row_count(rows.rows) == 0 || (pointer != nullptr) == wanted) return;
    refuse(text(what, wanted ? " is null, but " : " is given, but ", why));
  };
  agrees(targets, true, "targets", "there are rows");
  agrees(terms.nll, true, "terms.nll", "there are rows");
  const bool smooth = w.label_smoothing > 0;
  const std::string smoothing = text("label_smoothing is ", w.label_smoothing);
  agrees(terms.lse, smooth, "terms.lse", smoothing.c_str());
  agrees(terms.zbar, smooth, "terms.zbar", smoothing.c_str());
  const std::string z_loss = text("z_loss is ", w.z_loss);
  agrees(terms.lse_squared, w.z_loss > 0, "terms.lse_squared", z_loss.c_str());
}

template <class T>
void on_host(const LossRows& given, const Weighting& w, const void* targets,
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

}  // namespace

LossRows loss_rows(const Problem& problem) {
  return {problem.rows, classes_of(problem).count, stat_type(problem), problem.device};
}

void loss_terms(const LossRows& given, const Weighting& weighting, const void* targets,
                const LossTerms& terms, [[maybe_unused]] void* stream) {
  LossRows rows = given;
  settle_rows(rows.rows);
  check(rows, weighting, targets, terms);
  if (rows.device == Device::cuda) {
#ifdef CUTLOSS_CUDA
    return cuda_loss_terms(rows, weighting, targets, terms, stream);
#else
    throw Error(ErrorCode::unsupported, "loss_terms: this build of cutloss has no CUDA engine");
#endif
  }
  rows.type == DType::f64 ? on_host<double>(rows, weighting, targets, terms)
                          : on_host<float>(rows, weighting, targets, terms);
}

}  // namespace cutloss
