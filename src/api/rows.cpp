// The calls that need rows alone: the coefficients of a loss, its sum, and the closing of states.
#include "cutloss/rows.h"

#include <cmath>
#include <string>

#include "api/algorithms.h"
#include "core/dtype.h"
#include "core/refuse.h"
#include "core/text.h"
#include "core/validate.h"

namespace cutloss {
namespace {

void check_sizes(const char* call, const LossRows& rows) {
  if (rows.classes < 1) {
    refuse_value(call, ": V must be >= 1, got ", rows.classes);
  }
  check_product("N x V", rows.rows.sequences * rows.rows.length, rows.classes);
  if (rows.type == DType::f32 || rows.type == DType::f64) return;
  refuse(ErrorCode::invalid_type, call,
         ": type must be f32 or f64, the dtypes of per-row numbers, got ", name(rows.type));
}

void check(const LossRows& rows, const Weighting& w, const void* targets, const LossTerms& terms) {
  check_sizes("loss_terms", rows);
  if (!(w.label_smoothing >= 0 && w.label_smoothing <= 1)) {
    refuse_value("loss_terms: label_smoothing must be in [0, 1], got ", w.label_smoothing);
  }
  if (!(w.z_loss >= 0 && std::isfinite(w.z_loss))) {
    refuse_value("loss_terms: z_loss must be finite and >= 0, got ", w.z_loss);
  }
  if (terms.undefined == nullptr) refuse_value("loss_terms: terms.undefined is null");
  // Words are made where there is something to say: numbers in words take longer than the loss of
  // a few rows.
  const auto agrees = [&](const void* pointer, bool wanted, const char* member, auto... why) {
    if (row_count(rows.rows) == 0 || (pointer != nullptr) == wanted) return;
    refuse_value("loss_terms: ", member, wanted ? " is null, but " : " is given, but ", why...);
  };
  agrees(targets, true, "targets", "there are rows");
  agrees(terms.nll, true, "terms.nll", "there are rows");
  const bool smooth = w.label_smoothing > 0;
  agrees(terms.lse, smooth, "terms.lse", "label_smoothing is ", w.label_smoothing);
  agrees(terms.zbar, smooth, "terms.zbar", "label_smoothing is ", w.label_smoothing);
  agrees(terms.lse_squared, w.z_loss > 0, "terms.lse_squared", "z_loss is ", w.z_loss);
}

}  // namespace

LossRows loss_rows(const Problem& problem) {
  const Classes& classes = classes_of(problem);
  const std::int64_t V = classes.total != 0 ? classes.total : classes.count;
  return {problem.rows, V, stat_type(problem), problem.device};
}

void loss_terms(const LossRows& given, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream) {
  LossRows rows = given;
  settle_rows(rows.rows);
  check(rows, weighting, targets, terms);
  calls_of(rows.device, "loss_terms").loss_terms(rows, weighting, targets, terms, stream);
}

void sum_loss(const LossSum& sum, void* loss, void* stream) {
  const DeviceCalls& calls = calls_of(sum.rows.device, "weighted_loss");
  const RowGradients& up = sum.upstream;
  if (loss == nullptr) refuse_value("loss is null");
  const bool centred = sum.out.zbar_centred != nullptr;
  const auto need = [&](const void* given, const void* rows, const char* message) {
    if (given != nullptr && rows == nullptr && row_count(sum.rows.rows) > 0) refuse_value(message);
  };
  need(loss, sum.targets, "weighted_loss: targets is null");
  need(up.d_nll, sum.out.nll, "upstream.d_nll is given, but rows.nll is null");
  need(up.d_lse_squared, sum.out.lse, "upstream.d_lse_squared is given, but rows.lse is null");
  if (centred) {
    need(up.d_lse, sum.out.log_sum,
         "upstream.d_lse and rows.zbar_centred are given, but rows.log_sum is null");
  } else {
    need(up.d_lse, sum.out.lse, "upstream.d_lse is given, but rows.lse is null");
    need(up.d_zbar, sum.out.zbar,
         "upstream.d_zbar is given, but rows.zbar and rows.zbar_centred are null");
  }
  calls.sum_loss(sum, loss, stream);
}

void weighted_loss(const Plan& plan, const Args& args, void* loss, const bool* undefined) {
  if (args.upstream.d_zbar != nullptr && !plan.problem.wanted.zbar) {
    refuse_value("upstream.d_zbar is given, but the problem has wanted.zbar = false");
  }
  sum_loss({loss_rows(plan.problem), args.in.targets, args.rows, args.upstream, undefined}, loss,
           args.stream);
}

void close_rows(const LossRows& given, const RowStates& s, const RowOutputs& out, void* stream) {
  LossRows rows = given;
  settle_rows(rows.rows);
  check_sizes("close_rows", rows);
  if (s.count < 1) {
    refuse_value("close_rows: count must be >= 1, got ", s.count);
  }
  if (row_count(rows.rows) == 0) return;
  need_pointer(s.targets, "RowStates", "targets");
  need_state(s.states, "RowStates", "states");
  RowOutputs closed = out;
  closed.state = nullptr;
  if (s.some.rows != nullptr && s.some.count == 0) return;
  RowStates settled = s;
  if (s.stride == 0) settled.stride = row_count(rows.rows);
  if (settled.stride < row_count(rows.rows)) {
    refuse_value("close_rows: stride must be at least the number of rows, ", row_count(rows.rows),
                 " (0 means as many), got ", s.stride);
  }
  calls_of(rows.device, "close_rows").close_rows(rows, settled, closed, stream);
}

void empty_states(Device device, DType stat, std::int64_t rows, void* states, void* stream) {
  row_state_bytes(stat);  // throws for other dtypes
  if (rows < 0) {
    refuse_value("empty_states: rows must be >= 0, got ", rows);
  }
  const DeviceCalls& calls = calls_of(device, "empty_states");
  if (rows == 0) return;
  if (states == nullptr) refuse_value("empty_states: states is null");
  calls.empty_states(stat, rows, states, stream);
}

void scale_in_place(Device device, DType type, void* values, std::int64_t count, DType factor_type,
                    const void* factor, void* stream) {
  const DeviceCalls& calls = calls_of(device, "scale_in_place");
  if (calls.scale == nullptr) {
    refuse(ErrorCode::unsupported,
           "scale_in_place: the factor is in host memory: read it, and multiply the values");
  }
  if (count < 0) {
    refuse_value("scale_in_place: count must be >= 0, got ", count);
  }
  if (count == 0) return;
  if (values == nullptr || factor == nullptr) {
    refuse_value("scale_in_place: values or factor is null");
  }
  calls.scale(type, values, count, factor_type, factor, stream);
}

}  // namespace cutloss
