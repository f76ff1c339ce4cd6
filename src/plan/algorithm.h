// An algorithm: one way to compute one kind of source on one kind of device. It says what it cannot
// do, decides its sizes and books its memory, and opens sessions that do it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "cutloss/call.h"
#include "plan/decision.h"
#include "plan/sessions.h"

namespace cutloss {

// How the gradients come about, as far as a plan and its callers must know.
struct Way {
  // The user's word for it: none, rows, vocabulary.
  Schedule schedule = Schedule::none;
  // Forward keeps every row's logits, and backward makes the gradients of them.
  bool keeps_logits = false;

  bool operator==(const Way&) const = default;
};

// Gradients are made together with the statistics, chunk by chunk.
constexpr bool in_one_call(Way way) { return way.schedule == Schedule::rows && !way.keeps_logits; }

class Algorithm {
 public:
  virtual ~Algorithm() = default;
  // "cpu/by_rows".
  virtual std::string_view name() const = 0;
  virtual Way way() const = 0;
  // Why it cannot do a problem that its engine can; empty where it can.
  virtual std::string refusal(const Problem&) const { return ""; }
  // What it would do within `budget` bytes, kept and workspace of the larger pass together; null
  // where that is too little. Lowers `least` to the fewest bytes that it has found to do. The
  // problem is validated.
  virtual std::shared_ptr<const Decision> decide(const Problem& problem, std::int64_t budget,
                                                 std::int64_t& least) const = 0;
  // A session over checked pointers, of a decision of its own.
  virtual std::unique_ptr<CheckedSession> open(std::shared_ptr<const Decision> decision,
                                               const Args& args, Pass pass) const = 0;
};

// The algorithms of one kind of device, which share its libraries.
class Engine {
 public:
  virtual ~Engine() = default;
  // "cpu": what CUTLOSS_ENGINE and Problem::engine filter by.
  virtual std::string_view name() const = 0;
  // The libraries behind it with their versions, and the hardware that it has found.
  virtual std::string description() const = 0;
  // Why none of its algorithms can do a problem; empty where one may.
  virtual std::string refusal(const Problem& problem) const = 0;
  virtual std::span<const Algorithm* const> algorithms() const = 0;
};

}  // namespace cutloss
