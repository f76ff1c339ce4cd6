// The public calls: check, bind the engine's parts, run the schedule's loops.
#include "core/engine.h"
#include "core/text.h"
#include "core/validate.h"
#include "core/verbose.h"
#include "schedule/sweep.h"

namespace cutloss {
namespace {

constexpr Passes kForward{true, false};
constexpr Passes kBackward{false, true};
constexpr Passes kBoth{true, true};

std::unique_ptr<Parts> bind(const Plan& plan, const Args& args, Passes passes) {
  return engine_named(plan.engine).bind(plan, args, passes);
}

void need_rows_plan(const Plan& plan, const char* call) {
  if (plan.schedule != Schedule::rows || plan.keeps_logits) {
    throw Error(ErrorCode::invalid_value,
                text(call,
                     " needs a plan with schedule rows and upstream at_forward; this plan "
                     "has schedule ",
                     name(plan.schedule),
                     plan.keeps_logits ? " with kept logits: call forward, then backward"
                                       : ": call forward, then backward"));
  }
}

void check_chunk(const Plan& plan, std::int64_t chunk) {
  if (chunk < 0 || chunk >= chunk_count(plan)) {
    throw Error(ErrorCode::invalid_value,
                text("chunk ", chunk, " is outside [0, ", chunk_count(plan), ")"));
  }
}

void begin(Parts& parts) {
  parts.list_rows();
  parts.clear_ignored_outputs();
}

}  // namespace

void forward(const Plan& plan, const Args& args) {
  const CallReport report("forward", plan);
  check_args(plan, args, kForward);
  const auto parts = bind(plan, args, kForward);
  begin(*parts);
  for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
    sweep_statistics(plan, *parts, rows_of_chunk(plan, *parts, chunk), plan.keeps_logits);
  }
}

void backward(const Plan& plan, const Args& args) {
  const CallReport report("backward", plan);
  if (plan.schedule == Schedule::none || (plan.schedule == Schedule::rows && !plan.keeps_logits)) {
    throw Error(ErrorCode::invalid_value,
                text("backward needs a plan that makes gradients in backward; this plan has "
                     "schedule ",
                     name(plan.schedule),
                     plan.schedule == Schedule::rows ? ": call forward_backward" : ""));
  }
  check_args(plan, args, kBackward);
  const auto parts = bind(plan, args, kBackward);
  parts->list_rows();
  sweep_gradients(plan, *parts, {0, parts->rows_to_cover()}, plan.keeps_logits);
  parts->finish_gradients();
}

std::int64_t chunk_count(const Plan& plan) {
  const std::int64_t rows = row_count(plan.problem);
  if (plan.schedule != Schedule::rows) return 1;
  return rows == 0 ? 0 : (rows + plan.chunk_rows - 1) / plan.chunk_rows;
}

void begin(const Plan& plan, const Args& args) {
  need_rows_plan(plan, "begin");
  check_args(plan, args, kBoth);
  begin(*bind(plan, args, kBoth));
}

void statistics(const Plan& plan, const Args& args, std::int64_t chunk) {
  need_rows_plan(plan, "statistics");
  check_chunk(plan, chunk);
  const auto parts = bind(plan, args, kBoth);
  sweep_statistics(plan, *parts, rows_of_chunk(plan, *parts, chunk), /*keep=*/true);
}

void gradients(const Plan& plan, const Args& args, std::int64_t chunk) {
  need_rows_plan(plan, "gradients");
  check_chunk(plan, chunk);
  const auto parts = bind(plan, args, kBoth);
  sweep_gradients(plan, *parts, rows_of_chunk(plan, *parts, chunk), /*from_kept=*/true);
}

void finish(const Plan& plan, const Args& args) {
  need_rows_plan(plan, "finish");
  bind(plan, args, kBoth)->finish_gradients();
}

RowList chunk_rows(const Plan& plan, const Args& args, std::int64_t chunk) {
  need_rows_plan(plan, "chunk_rows");
  check_chunk(plan, chunk);
  const auto parts = bind(plan, args, kBoth);
  return parts->list(rows_of_chunk(plan, *parts, chunk));
}

void forward_backward(const Plan& plan, const Args& args) {
  const CallReport report("forward_backward", plan);
  begin(plan, args);
  for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
    statistics(plan, args, chunk);
    gradients(plan, args, chunk);
  }
  finish(plan, args);
}

void weighted_loss(const Plan& plan, const Args& args, void* loss, const bool* undefined) {
  const RowGradients& up = args.upstream;
  if (loss == nullptr) throw Error(ErrorCode::invalid_value, "loss is null");
  const bool centred = args.rows.zbar_centred != nullptr;
  if (((up.d_lse != nullptr && !centred) || up.d_lse_squared != nullptr) &&
      args.rows.lse == nullptr) {
    throw Error(ErrorCode::invalid_value,
                "upstream.d_lse or d_lse_squared is given, but rows.lse is null");
  }
  if (up.d_lse != nullptr && centred && args.rows.log_sum == nullptr) {
    throw Error(ErrorCode::invalid_value,
                "upstream.d_lse and rows.zbar_centred are given, but rows.log_sum is null");
  }
  if (up.d_zbar != nullptr && !plan.problem.wants_zbar) {
    throw Error(ErrorCode::invalid_value,
                "upstream.d_zbar is given, but the problem has wants_zbar = false");
  }
  if (up.d_zbar != nullptr && !centred && args.rows.zbar == nullptr) {
    throw Error(ErrorCode::invalid_value,
                "upstream.d_zbar is given, but rows.zbar and rows.zbar_centred are null");
  }
  bind(plan, args, kForward)->sum_loss(loss, undefined);
}

#ifndef CUTLOSS_CUDA
void cuda_scale(DType, void*, std::int64_t, DType, const void*, void*) {
  throw Error(ErrorCode::unsupported, "cuda_scale: this build of cutloss has no CUDA engine");
}
#endif

}  // namespace cutloss
