// From a problem whose source is Linear to a plan: which engine makes it how, in which memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cutloss/error.h"
#include "cutloss/problem.h"

namespace cutloss {

// What was decided for a problem, and why. Made by make_plan, read by anybody.
struct Plan {
  Problem problem;  // with every stride filled in, and a shift of at most the length
  std::string engine;
  Schedule schedule = Schedule::none;
  // rows, upstream known at backward: forward keeps the logits, backward makes the gradients.
  bool keeps_logits = false;
  int products = 1;  // N*V*D products of forward and backward together

  std::int64_t chunk_rows = 0;  // rows whose logits are kept at a time (schedule rows)
  std::int64_t block_rows = 0;  // rows and vocabulary columns of one product of forward
  std::int64_t slab = 0;
  std::int64_t gradient_rows = 0;  // the same for the products of the gradients
  std::int64_t gradient_slab = 0;

  std::int64_t kept_bytes = 0;                // Args::kept
  std::int64_t forward_workspace_bytes = 0;   // Args::workspace of forward, forward_backward
  std::int64_t backward_workspace_bytes = 0;  // Args::workspace of backward

  std::vector<std::string> reasons;  // a line for each engine and schedule considered
};

// Validates the problem and decides engine, schedule and sizes. Touches no data.
// Throws Error(invalid_value, invalid_type, unsupported, workspace).
Plan make_plan(const Problem& problem);

// The plan in words: engine, schedule, sizes, bytes, and the reasons, one a line.
std::string describe(const Plan& plan);

// What was found on this machine: a line for each engine (and why it is not there), the
// libraries behind it with their versions, processor features.
std::vector<std::string> describe_machine();

}  // namespace cutloss
