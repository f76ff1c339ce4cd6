// The public calls over logits: their checks, then the device's part of the library.
#include "core/logits_loss.h"

#include <cstdint>

#include "core/text.h"
#include "core/validate.h"

namespace cutloss {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_value, message);
}

void need(const void* pointer, const char* what) { need_pointer(pointer, "LogitsArgs", what); }

// The folded numbers are those that the engines compute with.
void check_options(const LogitsProblem& p) {
  const DType stat = stat_type_of(p);
  check_transform(p.softcap, p.logit_scale, p.temperature, stat);
  const auto [least, most] = usable_range(stat);
  const auto check_quotient = [&, least = least, most = most](const char* what, double value) {
    if (std::fabs(value) >= least && std::fabs(value) <= most) return;
    refuse(text(what, " must be between ", least, " and ", most, " in size, got ", value));
  };
  check_quotient("logit_scale / temperature", p.logit_scale / p.temperature);
  if (p.softcap) check_quotient("softcap / logit_scale", folded_softcap(p));
  const int blocks = p.blocks_per_row;
  if (blocks != 0 && blocks != 1 && blocks != 2 && blocks != 4 && blocks != 8) {
    refuse(text("blocks_per_row must be 0, 1, 2, 4 or 8, got ", blocks));
  }
}

void settle_strides(const LogitsProblem& p, std::int64_t& sequence, std::int64_t& row,
                    const std::string& which) {
  settle_stride(row, p.V, p.length, (which + "row_stride").c_str());
  const std::int64_t packed = (p.length > 0 ? p.length - 1 : 0) * row + p.V;
  settle_stride(sequence, packed, p.sequences, (which + "sequence_stride").c_str());
}

// The problem with its strides filled in.
LogitsProblem validated(LogitsProblem p) {
  check_positions(p.sequences, p.length, p.shift);
  if (p.V < 1) refuse(text("V must be >= 1, got ", p.V));
  check_product("N x V", p.sequences * p.length, p.V);
  settle_strides(p, p.sequence_stride, p.row_stride, "");
  settle_strides(p, p.gradient_sequence_stride, p.gradient_row_stride, "gradient_");
  check_options(p);
  return p;
}

// What lies between the first and the last element.
struct Span {
  std::uintptr_t begin, end;
};
Span span_of(const LogitsProblem& p, const void* data, std::int64_t sequence, std::int64_t row) {
  const std::int64_t elements = (p.sequences - 1) * sequence + (p.length - 1) * row + p.V;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return {begin, begin + static_cast<std::uintptr_t>(elements * size_of(p.type))};
}

void check_overlap(const LogitsProblem& p, const LogitsArgs& args) {
  const auto [a, a_end] = span_of(p, args.logits, p.sequence_stride, p.row_stride);
  const auto [b, b_end] =
      span_of(p, args.gradient, p.gradient_sequence_stride, p.gradient_row_stride);
  if (a == b) {
    const bool one_sequence = p.sequences == 1, one_row = p.length == 1;
    if ((one_row || p.row_stride == p.gradient_row_stride) &&
        (one_sequence || p.sequence_stride == p.gradient_sequence_stride)) {
      return;
    }
    refuse(text("gradient is in the place of the logits, but its strides are ",
                p.gradient_sequence_stride, " and ", p.gradient_row_stride,
                ", those of the logits ", p.sequence_stride, " and ", p.row_stride,
                ": they must be the same"));
  }
  if (a < b_end && b < a_end) {
    refuse(
        text("gradient overlaps the logits, but does not begin where they do: give it memory of "
             "its own, or the logits' own address and strides"));
  }
}

void check_args(const LogitsProblem& p, const LogitsArgs& args, Passes passes) {
  const auto [makes_statistics, makes_gradient] = passes;
  if (p.sequences * p.length == 0) return;
  need(args.logits, "logits");
  need(args.targets, "targets");
  if (p.has_class_weight) need(args.class_weight, "class_weight");
  if (row_count(p) > 0) {
    need(args.rows.nll, "rows.nll");
    need(args.rows.row_max, "rows.row_max");
    need(args.rows.log_sum, "rows.log_sum");
    if (p.has_row_temperature) need(args.temperature, "temperature");
    if (makes_statistics && p.wants_entropy) need(args.rows.entropy, "rows.entropy");
    if (makes_statistics && p.wants_zbar && args.rows.zbar_centred == nullptr) {
      need(args.rows.zbar, "rows.zbar");
    }
    if (makes_statistics && p.wants_argmax) need(args.rows.argmax, "rows.argmax");
  }
  if (!makes_gradient) return;
  need(args.gradient, "gradient");
  if (args.upstream.d_entropy != nullptr) {
    need(args.rows.entropy, "rows.entropy");
    if (makes_statistics && !p.wants_entropy) {
      refuse("upstream.d_entropy is given, but the problem has wants_entropy = false");
    }
  }
  check_overlap(p, args);
}

void run(const LogitsProblem& problem, const LogitsArgs& args, Passes passes) {
  const LogitsProblem p = validated(problem);
  check_args(p, args, passes);
  if (p.sequences * p.length == 0) return;
  if (p.device == Device::cuda) return cuda_logits(p, args, passes);
  cpu_logits(p, args, passes);
}

// As far as the loops over rows go that know nothing of logits.
Problem rows_of(const LogitsProblem& p) {
  Problem rows;
  rows.sequences = p.sequences;
  rows.length = p.length;
  rows.V = p.V;
  rows.D = 1;  // any will do
  rows.shift = p.shift;
  rows.e_type = rows.c_type = rows.bias_type = stat_type_of(p);
  rows.compute_type = stat_type_of(p);
  rows.target_type = p.target_type;
  rows.ignore_index = p.ignore_index;
  rows.device = p.device;
  return rows;
}

}  // namespace

std::int64_t row_count(const LogitsProblem& p) { return p.sequences * (p.length - p.shift); }

void forward(const LogitsProblem& problem, const LogitsArgs& args) {
  run(problem, args, {true, false});
}

void backward(const LogitsProblem& problem, const LogitsArgs& args) {
  run(problem, args, {false, true});
}

void forward_backward(const LogitsProblem& problem, const LogitsArgs& args) {
  run(problem, args, {true, true});
}

void loss_terms(const LogitsProblem& problem, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream) {
  loss_terms(rows_of(problem), weighting, targets, terms, stream);
}

void weighted_loss(const LogitsProblem& problem, const LogitsArgs& args, void* loss,
                   const bool* undefined) {
  const LogitsProblem p = validated(problem);
  const RowGradients& up = args.upstream;
  if (loss == nullptr) refuse("loss is null");
  if (row_count(p) > 0) {
    need(args.targets, "targets");
    if (up.d_nll != nullptr) need(args.rows.nll, "rows.nll");
    const bool centred = args.rows.zbar_centred != nullptr;
    if ((up.d_lse != nullptr && !centred) || up.d_lse_squared != nullptr) {
      need(args.rows.lse, "rows.lse");
    }
    if (up.d_lse != nullptr && centred) need(args.rows.log_sum, "rows.log_sum");
    if (up.d_zbar != nullptr && !centred) need(args.rows.zbar, "rows.zbar");
  }
  if (p.device == Device::cuda) return cuda_weighted_loss(p, args, loss, undefined);
  cpu_weighted_loss(p, args, loss, undefined);
}

#ifndef CUTLOSS_CUDA
namespace {
[[noreturn]] void no_cuda() {
  throw Error(ErrorCode::unsupported,
              "the logits are on a CUDA device, but this build of cutloss has no CUDA engine");
}
}  // namespace
void cuda_logits(const LogitsProblem&, const LogitsArgs&, Passes) { no_cuda(); }
void cuda_weighted_loss(const LogitsProblem&, const LogitsArgs&, void*, const bool*) { no_cuda(); }
#endif

}  // namespace cutloss
