// From a problem whose source is Linear to a plan: which algorithm computes it, in which memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cutloss/error.h"
#include "cutloss/problem.h"

namespace cutloss {

struct Decision;

// What was decided for a problem, and why. make_plan makes it, anybody may read it, and it is cheap
// to copy.
struct Plan {
  // The problem, with every stride filled in and a shift of at most the length.
  Problem problem;
  // For example "cpu/by_rows", an algorithm of the engine "cpu".
  std::string algorithm;
  std::string engine;
  Schedule schedule = Schedule::none;
  // Forward keeps every row's logits, and backward makes the gradients from them. Without it
  // gradients by rows are made together with the statistics, in one call.
  bool keeps_logits = false;
  // How many products of N x V x D forward and backward make together, not counting columns whose
  // gradients are made twice.
  int products = 1;
  // The number that the plan was chosen by: the time of forward and backward in such products, as
  // the engine's tuning table foretells it. It compares plans of one engine; no clock measured it.
  double predicted_time = 1;
  // Rows whose statistics are made together.
  std::int64_t chunk_rows = 0;

  // Bytes of Args::kept, of Args::workspace in sessions with statistics, and of Args::workspace in
  // those with gradients alone (0 where none may be opened).
  std::int64_t kept_bytes = 0;
  std::int64_t forward_workspace_bytes = 0;
  std::int64_t backward_workspace_bytes = 0;

  // A line for each engine, and for each way to compute, that was considered.
  std::vector<std::string> reasons;

  // All sizes and places that the algorithm's sessions follow.
  std::shared_ptr<const Decision> decision;
};

// Validates the problem and decides engine, schedule and sizes. Touches no data.
// Throws Error(invalid_value, invalid_type, unsupported, workspace).
Plan make_plan(const Problem& problem);

// The fewest bytes of Problem::max_workspace for which make_plan makes a plan, whatever the
// problem's own limit is. Throws as make_plan, workspace apart.
std::int64_t least_workspace(const Problem& problem);

// Whether a gradient of this dtype is made in backward alone: f16, where the loss scale must come
// before the rounding. Plans keep to it.
constexpr bool waits_for_loss_scale(DType gradient) { return gradient == DType::f16; }

// Describes a plan in words: algorithm, schedule, sizes, the memory buffer by buffer, and the
// reasons. The text is for people, and may change.
std::string describe(const Plan& plan);

// An engine of this build, on this machine.
struct EngineHere {
  std::string name;
  // Why it cannot be used here; empty where it can.
  std::string absent;
  // The libraries behind it with their versions, and the hardware that it has found.
  std::string description;
};
std::vector<EngineHere> engines_here();

// Describes the same in words, a line for each engine. The text is for people, and may change.
std::vector<std::string> describe_machine();

// Lists the numbers that plans of this build are made by, a line for each, engine by engine. What
// was measured stands beside them in the sources (tuning.h).
std::vector<std::string> describe_tuning();

}  // namespace cutloss
