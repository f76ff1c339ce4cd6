// An algorithm: one way to compute one kind of source on one kind of device. It says what it cannot
// do, decides its sizes and books its memory, and opens sessions that do it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plan/decision.h"
#include "plan/device_facts.h"
#include "plan/sessions.h"

namespace cutloss {

// How an algorithm makes the gradients, as far as a plan and its callers must know.
struct Way {
  // The user's word for it: none, rows or vocabulary.
  Schedule schedule = Schedule::none;
  // Forward keeps every row's logits, and backward makes the gradients from them.
  bool keeps_logits = false;

  bool operator==(const Way&) const = default;
};

// Whether gradients are made together with the statistics, chunk by chunk.
constexpr bool in_one_call(Way way) { return way.schedule == Schedule::rows && !way.keeps_logits; }

// The pass that a plan's first call makes, and whether there is a second call.
constexpr Pass first_pass(Way way) { return in_one_call(way) ? Pass::both : Pass::forward; }
constexpr bool has_backward(Way way) { return way.schedule != Schedule::none && !in_one_call(way); }

// How many products of N x V x D an algorithm of this way makes, not counting columns that come
// twice.
inline int products_of(const Problem& p, Way way) {
  const int gradients = (p.wanted.de.wanted ? 1 : 0) + (p.wanted.dc.wanted ? 1 : 0);
  if (way.schedule == Schedule::none) return 1;
  return (way.schedule == Schedule::rows ? 1 : 2) + gradients;
}

struct Algorithm {
  // For example "cpu/by_rows".
  std::string_view name;
  Way way;
  // Says why it cannot do a problem that its engine can, or nothing where it can. Null means that
  // it always can.
  std::string (*refusal)(const Problem& problem, const DeviceFacts& device) = nullptr;
  // Decides what it would do within `budget` bytes, kept and workspace of the larger pass together;
  // null where that is too little. Lowers `least` to the fewest bytes that it has found to suffice.
  // The problem is validated.
  std::shared_ptr<const Decision> (*decide)(const Algorithm& algorithm, const Problem& problem,
                                            const DeviceFacts& device, std::int64_t budget,
                                            std::int64_t& least) = nullptr;
  // Opens a session over checked pointers, for a decision of its own.
  std::unique_ptr<CheckedSession> (*open)(std::shared_ptr<const Decision> decision,
                                          const Args& args, Pass pass) = nullptr;
};

// The algorithms of one kind of device, which share its libraries.
struct Engine {
  // The name that CUTLOSS_ENGINE and Problem::engine filter by, for example "cpu".
  std::string_view name;
  // The device that it would work on now.
  const DeviceFacts& (*device)() = nullptr;
  // Describes its libraries with their versions and the hardware that it has found, where there is
  // a device.
  std::string (*description)() = nullptr;
  // Says why none of its algorithms can do a problem on a device that is there, or nothing where
  // one may.
  std::string (*refusal)(const Problem& problem, const DeviceFacts& device) = nullptr;
  std::span<const Algorithm* const> algorithms;
  // Lists the numbers that its decisions follow, a line for each.
  std::vector<std::string> (*tuning)() = nullptr;
};

// Says why an engine, or an algorithm, cannot do a problem: nothing where it may. The device may be
// absent.
inline std::string refusal_of(const Engine& engine, const Problem& problem,
                              const DeviceFacts& device) {
  return device.absent.empty() ? engine.refusal(problem, device) : device.absent;
}
inline std::string refusal_of(const Algorithm& algorithm, const Problem& problem,
                              const DeviceFacts& device) {
  return algorithm.refusal == nullptr ? "" : algorithm.refusal(problem, device);
}

}  // namespace cutloss
