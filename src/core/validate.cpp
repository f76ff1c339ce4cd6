#include "core/validate.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "core/dtype.h"
#include "core/refuse.h"
#include "core/row_map.h"
#include "core/row_state.h"
#include "core/text.h"

namespace cutloss {
namespace {

// The largest number of elements that a product of sizes may reach: 2^62 bytes / 8.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 59;

void check_sizes(const Problem& p) {
  const Head& head = head_of(p);
  const std::int64_t V = head.classes.count;
  if (V < 1) refuse_value("V (rows of C) must be >= 1, got ", V);
  if (head.D < 1) refuse_value("D (columns of E and C) must be >= 1, got ", head.D);
  const std::int64_t positions = p.rows.sequences * p.rows.length;
  check_product("N x D", positions, head.D);
  check_product("N x V", positions, V);
  check_product("V x D", V, head.D);
}

void check_types(const Problem& p) {
  const Head& head = head_of(p);
  const auto is_f64 = [](DType type) { return type == DType::f64 ? 1 : 0; };
  const int wide = is_f64(head.e_type) + is_f64(head.c_type) + is_f64(p.compute_type);
  const bool bias_fits = !head.has_bias || 3 * is_f64(head.bias_type) == wide;
  if ((wide != 0 && wide != 3) || !bias_fits) {
    refuse(ErrorCode::invalid_type, "f64 does not mix with other dtypes: E is ", name(head.e_type),
           ", C ", name(head.c_type), ", bias ", head.has_bias ? name(head.bias_type) : "absent",
           ", compute_type ", name(p.compute_type), "; convert all of them to one dtype");
  }
}

void check_linear_options(const Problem& p) {
  if (p.max_workspace && *p.max_workspace < 0) {
    refuse_value("max_workspace must be >= 0 bytes, got ", *p.max_workspace);
  }
  const Head& head = head_of(p);
  const Wanted& w = p.wanted;
  if (is_shard(head.classes) && !w.state) {
    const auto [first, count, total] = head.classes;
    refuse_value("classes {first ", first, ", count ", count, ", total ", total,
                 "} are a shard of a vocabulary, whose rows cannot be closed by itself: set "
                 "wanted.state, and call close_rows with the states of all shards");
  }
  if (w.dlogits.wanted) {
    refuse_value(
        "wanted.dlogits is the gradient of Logits, but the source of the problem is Linear: its "
        "gradients are wanted.de, dc and dbias");
  }
  if (w.dbias.wanted && !head.has_bias) {
    refuse_value("wanted.dbias is set, but there is no bias");
  }
  const DType stat = stat_type(p);
  check_gradient(w.de, {head.e_type, stat, /*may_add=*/false}, "de");
  check_gradient(w.dc, {head.c_type, stat, /*may_add=*/true}, "dc");
  check_gradient(w.dbias, {head.bias_type, stat, /*may_add=*/true}, "dbias");
  if (p.schedule == Schedule::none && wants_gradient(p)) {
    refuse_value("schedule none makes no gradient, but one is wanted (wanted.de, dc or dbias)");
  }
}

void need(const void* pointer, const char* member) { need_pointer(pointer, "Args", member); }

void need_aligned(const void* pointer, std::int64_t bytes, const char* member) {
  if (bytes == 0) return;
  need(pointer, member);
  if (reinterpret_cast<std::uintptr_t>(pointer) % 64 != 0) {
    refuse_value("Args::", member, " must be aligned to 64 bytes, got address ", pointer);
  }
}

}  // namespace

void settle_rows(Rows& rows) {
  const auto [sequences, length, shift] = std::tuple{rows.sequences, rows.length, rows.shift};
  if (sequences < 0 || length < 0) {
    refuse_value("sequences and length must be >= 0, got ", sequences, " and ", length);
  }
  if (shift < 0) refuse_value("shift must be >= 0, got ", shift);
  using Narrow = std::numeric_limits<std::int32_t>;
  if (rows.target_type == IndexType::i32 &&
      (rows.ignore_index < Narrow::min() || rows.ignore_index > Narrow::max())) {
    refuse_value("ignore_index must be a value that targets can hold: it is ", rows.ignore_index,
                 ", targets are int32");
  }
  check_product("sequences x length", sequences, length);
  rows.shift = settled_shift(rows);
}

void check_product(const char* member, std::int64_t a, std::int64_t b) {
  if (a != 0 && b > kMaxElements / a) {
    refuse_value(member, " = ", a, " x ", b, " elements is more than an address can hold");
  }
}

void settle_stride(std::int64_t& stride, std::int64_t packed, std::int64_t count,
                   const char* member) {
  if (stride == 0) stride = packed;
  if (count > 1 && stride < packed) {
    refuse_value(member, " must be at least ", packed, " (0 means packed), got ", stride);
  }
  if (count > 1) check_product(member, count, stride);
}

void settle_classes(Classes& classes) {
  const auto [first, count, total] = classes;
  if (total == 0) classes.total = count;
  if (first >= 0 && count <= classes.total && first <= classes.total - count) return;
  refuse_value("classes {first ", first, ", count ", count, ", total ", total,
               "} do not lie in a vocabulary: first must be >= 0, and first + count at most total");
}

bool is_shard(const Classes& classes) { return classes.count != classes.total; }

void check_gradient(const GradientWanted& gradient, const GradientRule& rule, const char* member) {
  const DType type = gradient.type.value_or(rule.own);
  if (type != rule.own && type != rule.sums) {
    refuse(ErrorCode::unsupported, "wanted.", member, ".type is ", name(type),
           ", but this gradient can be written in ", name(rule.own),
           ", the dtype of what it is the gradient of",
           rule.sums == rule.own ? "" : text(", or in ", name(rule.sums), ", that of its sums"),
           "; leave it unset, and convert the gradient yourself");
  }
  if (!gradient.add) return;
  if (!rule.may_add) {
    refuse(ErrorCode::unsupported, "wanted.", member,
           ".add is set, but this gradient can only be written: leave it false, and add the "
           "gradient yourself");
  }
  if (type != rule.sums) {
    refuse(ErrorCode::unsupported, "wanted.", member, ".add is set with dtype ", name(type),
           ", where each addition would round what is there: set wanted.", member, ".type to ",
           name(rule.sums), ", or leave add false");
  }
}

void check_upstream(const Problem& p) {
  if (wants_gradient(p) && p.upstream.when == Upstream::none) {
    refuse_value(
        "a gradient is wanted (in Problem::wanted), but upstream.when is none: set at_forward or "
        "at_backward");
  }
  if (p.upstream.entropy && !p.wanted.entropy) {
    refuse_value("upstream.entropy needs wanted.entropy");
  }
  if (p.upstream.zbar && !p.wanted.zbar) refuse_value("upstream.zbar needs wanted.zbar");
}

void check_device(const Problem& p) {
  if (p.device_index < -1 || (p.device == Device::cpu && p.device_index != -1)) {
    refuse_value(
        "device_index must be that of a CUDA device, or -1 (the current one, or the CPU), got ",
        p.device_index, " for a problem on ", p.device == Device::cpu ? "the CPU" : "CUDA");
  }
}

void check_transform(const Transform& transform, DType stat) {
  const auto& [softcap, logit_scale, temperature] = transform;
  const auto [least, most] = usable_range(stat);
  const auto is_usable = [least = least, most = most](double value) {
    return std::fabs(value) >= least && std::fabs(value) <= most;
  };
  const auto refuse_number = [&, least = least, most = most](const char* member, const char* rule,
                                                             double value) {
    refuse_value(member, " must be a finite number ", rule, ", between ", least, " and ", most,
                 " in size, got ", value);
  };
  if (softcap && !(*softcap > 0 && is_usable(*softcap))) refuse_number("softcap", "> 0", *softcap);
  if (!is_usable(logit_scale)) refuse_number("logit_scale", "other than 0", logit_scale);
  if (!(temperature > 0 && is_usable(temperature))) {
    refuse_number("temperature", "> 0", temperature);
  }
  check_quotient("logit_scale / temperature", logit_scale / temperature, stat);
}

void check_quotient(const char* member, double value, DType stat) {
  const auto [least, most] = usable_range(stat);
  if (std::fabs(value) >= least && std::fabs(value) <= most) return;
  refuse_value(member, " must be between ", least, " and ", most, " in size, got ", value);
}

void need_pointer(const void* pointer, const char* args, const char* member) {
  if (pointer == nullptr) refuse_value(args, "::", member, " is null, but the call needs it");
}

void need_state(const void* state, const char* args, const char* member) {
  need_pointer(state, args, member);
  if (reinterpret_cast<std::uintptr_t>(state) % 8 == 0) return;
  refuse_value(args, "::", member, " must be aligned to 8 bytes, got address ", state);
}

std::int64_t row_state_bytes(DType stat) {
  if (stat == DType::f64) return sizeof(RowState<double>);
  if (stat == DType::f32) return sizeof(RowState<float>);
  refuse(ErrorCode::invalid_type,
         "row_state_bytes: stat must be f32 or f64, the dtypes of per-row numbers, got ",
         name(stat));
}

void check_target(std::int64_t target, std::int64_t V, std::int64_t ignore_index, Position at) {
  if (target >= 0 && target < V) return;
  refuse_value("the target at position (", at.sequence, ", ", at.column, ") is ", target,
               ", outside [0, V = ", V, ") and not ignore_index = ", ignore_index);
}

void check_row_temperature(double own, double in_all, DType stat, Position at) {
  const auto [least, most] = usable_range(stat);
  if (in_all >= least && in_all <= most) return;
  refuse_value("the temperature at position (", at.sequence, ", ", at.column, ") is ", own,
               ", but every temperature must be a finite number > 0, between ", least, " and ",
               most);
}

Problem validated(Problem p) {
  settle_rows(p.rows);
  check_sizes(p);
  Head& head = head_of(p);
  settle_classes(head.classes);
  settle_stride(head.e_row_stride, head.D, p.rows.length, "e_row_stride");
  settle_stride(head.e_sequence_stride,
                (p.rows.length > 0 ? p.rows.length - 1 : 0) * head.e_row_stride + head.D,
                p.rows.sequences, "e_sequence_stride");
  settle_stride(head.c_row_stride, head.D, head.classes.count, "c_row_stride");
  check_types(p);
  check_transform(p.transform, stat_type(p));
  check_device(p);
  check_linear_options(p);
  check_upstream(p);
  return p;
}

void check_row_pointers(const Problem& p, const RowPointers& given, Pass pass) {
  const bool forward = makes_statistics(pass), backward = makes_gradients(pass);
  const auto& [rows, upstream, args] = given;
  const auto need = [args = args](const void* pointer, const char* member) {
    need_pointer(pointer, args, member);
  };
  if (row_count(p) > 0) {
    if (forward && p.wanted.state) need_state(rows.state, args, "rows.state");
    if (backward || !p.wanted.state) {
      need(rows.nll, "rows.nll");
      need(rows.row_max, "rows.row_max");
      need(rows.log_sum, "rows.log_sum");
    }
    if (forward && !p.wanted.state) {
      if (p.wanted.entropy) need(rows.entropy, "rows.entropy");
      if (p.wanted.zbar && rows.zbar_centred == nullptr) need(rows.zbar, "rows.zbar");
      if (p.wanted.argmax) need(rows.argmax, "rows.argmax");
    }
    if (backward && upstream.d_entropy != nullptr) need(rows.entropy, "rows.entropy");
  }
  if (!backward) return;
  if (upstream.d_entropy != nullptr && !p.upstream.entropy) {
    refuse_value("upstream.d_entropy is given, but the problem has upstream.entropy = false");
  }
  if (upstream.d_zbar != nullptr && !p.upstream.zbar) {
    refuse_value("upstream.d_zbar is given, but the problem has upstream.zbar = false");
  }
}

void check_args(const Plan& plan, const Args& args, Pass pass) {
  const Problem& p = plan.problem;
  const bool has_rows = row_count(p) > 0;
  if (has_rows) {
    need(args.in.e, "in.e");
    need(args.in.targets, "in.targets");
    if (p.rows.has_temperature) need(args.in.temperature, "in.temperature");
  }
  check_row_pointers(p, {args.rows, args.upstream, "Args"}, pass);
  need(args.in.c, "in.c");
  if (head_of(p).has_bias) need(args.in.bias, "in.bias");
  if (p.has_class_weight) need(args.in.class_weight, "in.class_weight");
  if (makes_gradients(pass)) {
    if (p.wanted.de.wanted && has_rows) need(args.gradients.de, "gradients.de");
    if (p.wanted.dc.wanted) need(args.gradients.dc, "gradients.dc");
    if (p.wanted.dbias.wanted) need(args.gradients.dbias, "gradients.dbias");
  }
  need_aligned(args.kept, plan.kept_bytes, "kept");
  need_aligned(
      args.workspace,
      makes_statistics(pass) ? plan.forward_workspace_bytes : plan.backward_workspace_bytes,
      "workspace");
}

}  // namespace cutloss
