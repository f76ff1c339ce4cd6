// The public calls over logits: each checks what it was given, then calls the device's part of the
// library.
#include <cstdint>

#include "api/algorithms.h"
#include "core/dtype.h"
#include "core/folded_softcap.h"
#include "core/refuse.h"
#include "core/validate.h"

namespace cutloss {
namespace {

void need(const void* pointer, const char* member) { need_pointer(pointer, "LogitsArgs", member); }

void check_numbers(const Problem& p) {
  check_transform(p.transform, stat_type(p));
  if (p.transform.softcap) check_quotient("softcap / logit_scale", folded_softcap(p), stat_type(p));
  const int blocks = logits_of(p).blocks_per_row;
  if (blocks != 0 && blocks != 1 && blocks != 2 && blocks != 4 && blocks != 8) {
    refuse_value("blocks_per_row must be 0, 1, 2, 4 or 8, got ", blocks);
  }
}

// Refuses options that only a plan could heed: here they would silently do nothing.
void refuse_what_plans_take(const Problem& p) {
  const DType type = logits_of(p).type;
  if (p.compute_type != DType::f32 && p.compute_type != type) {
    refuse(ErrorCode::invalid_type, "compute_type is ", name(p.compute_type),
           ", but the logits are ", name(type),
           ": no product is made of them; leave compute_type f32");
  }
  if (p.wanted.de.wanted || p.wanted.dc.wanted || p.wanted.dbias.wanted) {
    refuse_value(
        "wanted.de, dc or dbias is set, but the source of the problem is Logits: its gradient is "
        "wanted.dlogits");
  }
  if (p.rows.num_valid) {
    refuse_value("rows.num_valid is ", *p.rows.num_valid,
                 ", but calls over logits find out themselves which rows count: leave it unset");
  }
  if (p.max_workspace) {
    refuse_value("max_workspace is ", *p.max_workspace,
                 ", but calls over logits need no workspace: leave it unset");
  }
  if (p.schedule != Schedule::automatic || !p.engine.empty()) {
    refuse_value(
        "schedule is ", name(p.schedule), " and engine '", p.engine,
        "', but calls over logits have no plan that could choose: leave them automatic and empty");
  }
}

struct RowStrides {
  std::int64_t& sequence;
  std::int64_t& row;
};

void settle_strides(const Problem& p, RowStrides strides, const std::string& which) {
  const std::int64_t V = classes_of(p).count, length = p.rows.length;
  settle_stride(strides.row, V, length, (which + "row_stride").c_str());
  const std::int64_t packed = (length > 0 ? length - 1 : 0) * strides.row + V;
  settle_stride(strides.sequence, packed, p.rows.sequences, (which + "sequence_stride").c_str());
}

// A gradient that takes the logits' place must have their strides.
void settle_place(const Problem& p, RowStrides gradient) {
  const Logits& logits = logits_of(p);
  if (!logits.overwrite) return;
  if (gradient.row == 0) gradient.row = logits.row_stride;
  if (gradient.sequence == 0) gradient.sequence = logits.sequence_stride;
  const bool one_sequence = p.rows.sequences <= 1, one_row = p.rows.length <= 1;
  if ((one_row || gradient.row == logits.row_stride) &&
      (one_sequence || gradient.sequence == logits.sequence_stride)) {
    return;
  }
  refuse_value("the gradient takes the place of the logits (overwrite), but its strides are ",
               gradient.sequence, " and ", gradient.row, ", those of the logits ",
               logits.sequence_stride, " and ", logits.row_stride, ": they must be the same, or 0");
}

// Returns the problem with its strides and classes filled in and its shift settled.
Problem validated_logits(Problem p) {
  Logits& logits = logits_of(p);
  settle_rows(p.rows);
  if (logits.classes.count < 1) refuse_value("V must be >= 1, got ", logits.classes.count);
  check_product("N x V", p.rows.sequences * p.rows.length, logits.classes.count);
  settle_classes(logits.classes);
  if (is_shard(logits.classes) || p.wanted.state) {
    refuse(ErrorCode::unsupported,
           "losses over logits take a whole vocabulary and close its rows, but classes are {first ",
           logits.classes.first, ", count ", logits.classes.count, ", total ", logits.classes.total,
           "} and wanted.state is ", p.wanted.state ? "true" : "false",
           ": gather the logits, or take a Linear source, which can be sharded");
  }
  settle_strides(p, {logits.sequence_stride, logits.row_stride}, "");
  const RowStrides gradient{p.wanted.dlogits_sequence_stride, p.wanted.dlogits_row_stride};
  settle_place(p, gradient);
  settle_strides(p, gradient, "dlogits_");
  check_numbers(p);
  check_device(p);
  refuse_what_plans_take(p);
  check_gradient(p.wanted.dlogits, {logits.type, logits.type, /*may_add=*/false}, "dlogits");
  check_upstream(p);
  return p;
}

// The addresses from the first element to behind the last.
struct Span {
  std::uintptr_t begin, end;
};
Span span_of(const Problem& p, const void* data, std::int64_t sequence, std::int64_t row) {
  const Logits& logits = logits_of(p);
  const std::int64_t elements =
      (p.rows.sequences - 1) * sequence + (p.rows.length - 1) * row + logits.classes.count;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return {begin, begin + static_cast<std::uintptr_t>(elements * size_of(logits.type))};
}

void check_overlap(const Problem& p, const LogitsArgs& args) {
  const Logits& logits = logits_of(p);
  if (logits.overwrite) {
    if (args.gradient == args.logits) return;
    refuse_value("logits.overwrite is set, but gradient is at ", args.gradient, ", the logits at ",
                 args.logits, ": give the logits' address, or leave overwrite false");
  }
  const auto [a, a_end] = span_of(p, args.logits, logits.sequence_stride, logits.row_stride);
  const auto [b, b_end] =
      span_of(p, args.gradient, p.wanted.dlogits_sequence_stride, p.wanted.dlogits_row_stride);
  if (a < b_end && b < a_end) {
    refuse_value(
        "gradient, at ", args.gradient, ", overlaps the logits, at ", args.logits,
        ": give it memory of its own, or set logits.overwrite and give the logits' own address");
  }
}

void check_args(const Problem& p, const LogitsArgs& args, Pass pass) {
  if (p.rows.sequences * p.rows.length == 0) return;
  need(args.logits, "logits");
  need(args.targets, "targets");
  if (p.has_class_weight) need(args.class_weight, "class_weight");
  if (p.rows.has_temperature && row_count(p) > 0) need(args.temperature, "temperature");
  check_row_pointers(p, {args.rows, args.upstream, "LogitsArgs"}, pass);
  if (!makes_gradients(pass)) return;
  if (!p.wanted.dlogits.wanted) {
    refuse_value(
        "the call makes a gradient, but the problem has wanted.dlogits.wanted = false: set it, or "
        "call forward");
  }
  need(args.gradient, "gradient");
  check_overlap(p, args);
}

void run(const Problem& problem, const LogitsArgs& args, Pass pass) {
  const Problem p = validated_logits(problem);
  const DeviceCalls& calls = calls_of(p.device, "a loss over logits");
  check_args(p, args, pass);
  if (p.rows.sequences * p.rows.length > 0) calls.logits(p, args, pass);
}

}  // namespace

void forward(const Problem& problem, const LogitsArgs& args) { run(problem, args, Pass::forward); }

void backward(const Problem& problem, const LogitsArgs& args) {
  run(problem, args, Pass::backward);
}

void forward_backward(const Problem& problem, const LogitsArgs& args) {
  run(problem, args, Pass::both);
}

void weighted_loss(const Problem& problem, const LogitsArgs& args, void* loss,
                   const bool* undefined) {
  const Problem p = validated_logits(problem);
  sum_loss({loss_rows(p), args.targets, args.rows, args.upstream, undefined}, loss, args.stream);
}

}  // namespace cutloss
