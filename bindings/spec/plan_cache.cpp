#include "spec/plan_cache.h"

#include <array>
#include <cstddef>
#include <optional>

namespace cutloss::spec {
namespace {

struct Made {
  Problem problem;
  std::shared_ptr<const Plan> plan;
};

// A forward asks for two or three plans, its backward for one.
constexpr std::size_t kRemembered = 16;

struct Memory {
  std::array<std::optional<Made>, kRemembered> made;
  std::size_t next = 0;  // the oldest, to be forgotten
};

}  // namespace

std::shared_ptr<const Plan> plan_for(const Problem& problem) {
  thread_local Memory memory;
  for (const std::optional<Made>& made : memory.made) {
    if (made && made->problem == problem) return made->plan;
  }
  auto plan = std::make_shared<const Plan>(make_plan(problem));
  memory.made[memory.next] = Made{problem, plan};
  memory.next = (memory.next + 1) % kRemembered;
  return plan;
}

}  // namespace cutloss::spec
