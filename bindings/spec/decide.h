// What a call of a loss does, decided once for every language and framework.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cutloss/plan.h"

namespace cutloss::spec {

struct Decided {
  // Gradients are made along with the loss, by rows. Else forward makes statistics, and backward
  // the gradients.
  bool in_forward = false;
  std::shared_ptr<const Plan> plan;
  // Why gradients are not made along with the loss, though its weights are known in forward: the
  // reasons of the plan that was looked at for it.
  std::vector<std::string> not_in_forward;
};

// The plan of a problem. Its upstream.when says whether the weights of the rows' outputs are known
// in forward, up to one factor; where the plan makes no use of that, the problem that is planned is
// the same with gradients at_backward. Throws as make_plan.
Decided decide(const Problem& problem);

// What is decided up to a number of rows.
struct UpToRows {
  std::int64_t most = 0;
  bool in_forward = false;
  Schedule schedule = Schedule::vocabulary;
};

// What is decided for each number of rows, for callers that do not know theirs yet (compilers,
// which trace with symbols). Entry after entry up to its `most`; the last is for all others. Of the
// problem the rows' own sizes do not count, nor does what num_valid is, only that there is one.
// Logits are kept by no entry: what is kept must have a size. Where the schedule that is asked for
// would keep them, an entry says `rows` without in_forward. Where no plan is found an entry goes
// on: the call says why.
//
// Found by trial, in steps of a 32nd of the rows, and exactly where two steps differ. A way that is
// taken by a band of rows narrower than that is passed over: where a budget is just enough, plans
// change to and fro with the rounding of chunks. What is computed there is right all the same.
std::vector<UpToRows> decide_for_rows(const Problem& problem);

}  // namespace cutloss::spec
