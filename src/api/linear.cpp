// The calls of a plan: each checks the pointers, opens a session and runs it over all chunks.
#include "api/algorithms.h"
#include "core/refuse.h"
#include "core/text.h"
#include "core/validate.h"
#include "core/verbose.h"

namespace cutloss {
namespace {

Way way_of(const Plan& plan) { return {plan.schedule, plan.keeps_logits}; }

// Refuses a pass that the plan has not. Every plan has forward; the others depend on where the
// gradients are made.
void need_pass(const Plan& plan, Pass pass) {
  const std::string has = text("; this plan has schedule ", name(plan.schedule),
                               plan.keeps_logits ? " with kept logits" : "");
  if (pass == Pass::both && !in_one_call(way_of(plan))) {
    refuse_value(
        "gradients with the statistics (forward_backward, a session of both) need a plan with "
        "schedule rows and upstream at_forward",
        has, ": call forward, then backward");
  }
  if (pass == Pass::backward && (in_one_call(way_of(plan)) || plan.schedule == Schedule::none)) {
    refuse_value("backward needs a plan that makes gradients in backward", has,
                 in_one_call(way_of(plan)) ? ": call forward_backward" : "");
  }
}

const Decision& decision_of(const Plan& plan) {
  if (plan.decision == nullptr) refuse_value("the plan is empty: make_plan makes plans");
  return *plan.decision;
}

std::unique_ptr<CheckedSession> open_checked(const Plan& plan, const Args& args, Pass pass) {
  const Algorithm& algorithm = *decision_of(plan).algorithm;
  need_pass(plan, pass);
  check_args(plan, args, pass);
  return algorithm.open(plan.decision, args, pass);
}

void run(const char* call, const Plan& plan, const Args& args, Pass pass) {
  const CallReport report(call, plan);
  const auto session = open_checked(plan, args, pass);
  session->begin();
  for (std::int64_t chunk = 0; chunk < chunk_count(*plan.decision); ++chunk) {
    if (makes_statistics(pass)) session->statistics(chunk);
    if (makes_gradients(pass)) session->gradients(chunk);
  }
  if (makes_gradients(pass)) session->finish();
}

}  // namespace

std::int64_t chunk_count(const Plan& plan) { return chunk_count(decision_of(plan)); }

std::unique_ptr<Session> open(const Plan& plan, const Args& args, Pass pass) {
  return open_checked(plan, args, pass);
}

std::unique_ptr<Session> resume(const Plan& plan, const Args& args, Pass pass) {
  std::unique_ptr<CheckedSession> session = open_checked(plan, args, pass);
  session->resume();
  return session;
}

void forward(const Plan& plan, const Args& args) { run("forward", plan, args, Pass::forward); }

void backward(const Plan& plan, const Args& args) { run("backward", plan, args, Pass::backward); }

void forward_backward(const Plan& plan, const Args& args) {
  if (plan.problem.wanted.state) {
    refuse_value(
        "forward_backward closes the rows between its passes, but wanted.state leaves them open: "
        "open a session, and call close_rows between statistics and gradients");
  }
  run("forward_backward", plan, args, Pass::both);
}

}  // namespace cutloss
