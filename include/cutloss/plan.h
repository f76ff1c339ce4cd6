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

// What was decided for a problem, and why. Made by make_plan, read by anybody, cheap to copy.
struct Plan {
  // With every stride filled in, and a shift of at most the length.
  Problem problem;
  // "cpu/by_rows", of the engine "cpu".
  std::string algorithm;
  std::string engine;
  Schedule schedule = Schedule::none;
  // With schedule rows: forward keeps every row's logits, and backward makes the gradients of them.
  // Else gradients by rows are made with the statistics, in one call.
  bool keeps_logits = false;
  // N x V x D products of forward and backward together, but for columns whose gradients are made
  // twice.
  int products = 1;
  // What the plan was chosen by: the time of forward and backward in such products, as the engine's
  // tuning table foretells it. Of one engine only; not of a clock.
  double predicted_time = 1;
  // Rows whose statistics are made together.
  std::int64_t chunk_rows = 0;

  // Bytes of Args::kept, and of Args::workspace: of sessions with statistics, and of those with
  // gradients alone (0 where none may be opened).
  std::int64_t kept_bytes = 0;
  std::int64_t forward_workspace_bytes = 0;
  std::int64_t backward_workspace_bytes = 0;

  // A line for each engine and each way that was considered.
  std::vector<std::string> reasons;

  // What the algorithm's sessions go by.
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

// The plan in words: algorithm, schedule, sizes, the memory buffer by buffer, and the reasons. For
// people: the text may change.
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

// The same in words, a line for each engine. For people: the text may change.
std::vector<std::string> describe_machine();

// The numbers that plans of this build are made by: a line for each, by engine. What was measured
// stands beside them in the sources (tuning.h).
std::vector<std::string> describe_tuning();

}  // namespace cutloss
