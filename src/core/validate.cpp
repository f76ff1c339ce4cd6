#include "core/validate.h"

#include <cmath>
#include <limits>

#include "core/dtype.h"
#include "core/text.h"

namespace cutloss {
namespace {

[[noreturn]] void refuse_value(const std::string& message) {
  throw Error(ErrorCode::invalid_value, message);
}

// Largest element count that any product of sizes may reach: 2^62 bytes / 8.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 59;

void check_sizes(const Problem& p) {
  check_positions(p.sequences, p.length, p.shift);
  if (p.V < 1) refuse_value(text("V (rows of C) must be >= 1, got ", p.V));
  if (p.D < 1) refuse_value(text("D (columns of E and C) must be >= 1, got ", p.D));
  const std::int64_t rows = p.sequences * p.length;
  check_product("N x D", rows, p.D);
  check_product("N x V", rows, p.V);
  check_product("V x D", p.V, p.D);
}

void check_types(const Problem& p) {
  const auto refuse = [](const std::string& message) {
    throw Error(ErrorCode::invalid_type, message);
  };
  const auto is_f64 = [](DType type) { return type == DType::f64; };
  const bool any = is_f64(p.e_type) || is_f64(p.c_type) || (p.has_bias && is_f64(p.bias_type)) ||
                   is_f64(p.compute_type);
  const bool all = is_f64(p.e_type) && is_f64(p.c_type) && (!p.has_bias || is_f64(p.bias_type)) &&
                   is_f64(p.compute_type);
  if (any && !all) {
    refuse(text("f64 does not mix with other dtypes: E is ", name(p.e_type), ", C ", name(p.c_type),
                ", bias ", p.has_bias ? name(p.bias_type) : "absent", ", compute_type ",
                name(p.compute_type), "; convert all of them to one dtype"));
  }
}

void check_options(const Problem& p) {
  check_transform(p.softcap, p.logit_scale, p.temperature, stat_type(p.compute_type));
  if (p.max_workspace && *p.max_workspace < 0) {
    refuse_value(text("max_workspace must be >= 0 bytes, got ", *p.max_workspace));
  }
  const bool wants_gradient = p.needs_de || p.needs_dc || p.needs_dbias;
  if (p.needs_dbias && !p.has_bias) refuse_value("needs_dbias is set, but there is no bias");
  if (wants_gradient && p.upstream == Upstream::none) {
    refuse_value(
        "a gradient is wanted (needs_*), but upstream is none: set at_forward or "
        "at_backward");
  }
  if (p.schedule == Schedule::none && wants_gradient) {
    refuse_value("schedule none makes no gradient, but one is wanted (needs_*)");
  }
  if (p.entropy_gradient && !p.wants_entropy) {
    refuse_value("entropy_gradient needs wants_entropy");
  }
  if (p.zbar_gradient && !p.wants_zbar) refuse_value("zbar_gradient needs wants_zbar");
}

void need(const void* pointer, const char* what) { need_pointer(pointer, "Args", what); }

void need_aligned(const void* pointer, std::int64_t bytes, const char* what) {
  if (bytes == 0) return;
  need(pointer, what);
  if (reinterpret_cast<std::uintptr_t>(pointer) % 64 != 0) {
    refuse_value(text("Args::", what, " must be aligned to 64 bytes, got address ", pointer));
  }
}

}  // namespace

void check_positions(std::int64_t sequences, std::int64_t length, std::int64_t shift) {
  if (sequences < 0 || length < 0) {
    refuse_value(text("sequences and length must be >= 0, got ", sequences, " and ", length));
  }
  if (shift < 0) refuse_value(text("shift must be >= 0, got ", shift));
  if (shift > 0 && shift >= length) {
    refuse_value(text("shift must be smaller than the sequence length ", length, ", got ", shift));
  }
  check_product("sequences x length", sequences, length);
}

void check_product(const char* what, std::int64_t a, std::int64_t b) {
  if (a != 0 && b > kMaxElements / a) {
    refuse_value(text(what, " = ", a, " x ", b, " elements is more than an address can hold"));
  }
}

void settle_stride(std::int64_t& stride, std::int64_t packed, std::int64_t count,
                   const char* what) {
  if (stride == 0) stride = packed;
  if (count > 1 && stride < packed) {
    refuse_value(text(what, " must be at least ", packed, " (0 means packed), got ", stride));
  }
  if (count > 1) check_product(what, count, stride);
}

void check_transform(const std::optional<double>& softcap, double logit_scale, double temperature,
                     DType stat) {
  const auto [least, most] = usable_range(stat);
  const auto is_usable = [&, least = least, most = most](double value) {
    return std::fabs(value) >= least && std::fabs(value) <= most;
  };
  const auto refuse_number = [&, least = least, most = most](const char* what, const char* rule,
                                                             double value) {
    refuse_value(text(what, " must be a finite number ", rule, ", between ", least, " and ", most,
                      " in size, got ", value));
  };
  if (softcap && !(*softcap > 0 && is_usable(*softcap))) refuse_number("softcap", "> 0", *softcap);
  if (!is_usable(logit_scale)) refuse_number("logit_scale", "other than 0", logit_scale);
  if (!(temperature > 0 && is_usable(temperature))) {
    refuse_number("temperature", "> 0", temperature);
  }
}

void need_pointer(const void* pointer, const char* args, const char* what) {
  if (pointer == nullptr) refuse_value(text(args, "::", what, " is null, but the call needs it"));
}

void check_target(std::int64_t target, std::int64_t V, std::int64_t ignore_index, Position at) {
  if (target >= 0 && target < V) return;
  refuse_value(text("the target at position (", at.sequence, ", ", at.column, ") is ", target,
                    ", outside [0, V = ", V, ") and not ignore_index = ", ignore_index));
}

void check_row_temperature(double own, double in_all, DType stat, Position at) {
  const auto [least, most] = usable_range(stat);
  if (in_all >= least && in_all <= most) return;
  refuse_value(text("the temperature at position (", at.sequence, ", ", at.column, ") is ", own,
                    ", but every temperature must be a finite number > 0, between ", least, " and ",
                    most));
}

Problem validated(Problem p) {
  check_sizes(p);
  settle_stride(p.e_row_stride, p.D, p.length, "e_row_stride");
  settle_stride(p.e_sequence_stride, (p.length > 0 ? p.length - 1 : 0) * p.e_row_stride + p.D,
                p.sequences, "e_sequence_stride");
  settle_stride(p.c_row_stride, p.D, p.V, "c_row_stride");
  check_types(p);
  check_options(p);
  return p;
}

void check_args(const Plan& plan, const Args& args, Passes passes) {
  const auto [forward, backward] = passes;
  const Problem& p = plan.problem;
  if (row_count(p) > 0) {
    need(args.in.e, "in.e");
    need(args.in.targets, "in.targets");
    need(args.rows.nll, "rows.nll");
    need(args.rows.row_max, "rows.row_max");
    need(args.rows.log_sum, "rows.log_sum");
    if (p.has_row_temperature) need(args.in.temperature, "in.temperature");
    if (forward && p.wants_entropy) need(args.rows.entropy, "rows.entropy");
    if (forward && p.wants_zbar && args.rows.zbar_centred == nullptr) {
      need(args.rows.zbar, "rows.zbar");
    }
    if (forward && p.wants_argmax) need(args.rows.argmax, "rows.argmax");
    if (backward && args.upstream.d_entropy != nullptr) need(args.rows.entropy, "rows.entropy");
  }
  need(args.in.c, "in.c");
  if (p.has_bias) need(args.in.bias, "in.bias");
  if (p.has_class_weight) need(args.in.class_weight, "in.class_weight");
  if (backward) {
    if (p.needs_de && row_count(p) > 0) need(args.gradients.de, "gradients.de");
    if (p.needs_dc) need(args.gradients.dc, "gradients.dc");
    if (p.needs_dbias) need(args.gradients.dbias, "gradients.dbias");
    if (args.upstream.d_entropy != nullptr && !p.entropy_gradient) {
      refuse_value("upstream.d_entropy is given, but the problem has entropy_gradient = false");
    }
    if (args.upstream.d_zbar != nullptr && !p.zbar_gradient) {
      refuse_value("upstream.d_zbar is given, but the problem has zbar_gradient = false");
    }
  }
  need_aligned(args.kept, plan.kept_bytes, "kept");
  need_aligned(args.workspace,
               forward ? plan.forward_workspace_bytes : plan.backward_workspace_bytes, "workspace");
}

}  // namespace cutloss
