// The calls that ask all engines of this build: for a plan, for what they found on this machine,
// for the numbers that plans are tuned by.
#include "plan/plan.h"
#include "api/algorithms.h"
#include "core/text.h"

namespace cutloss {

Plan make_plan(const Problem& problem) { return make_plan(problem, engines(), nullptr); }

std::int64_t least_workspace(const Problem& problem) {
  return least_workspace(problem, engines(), nullptr);
}

std::vector<EngineHere> engines_here() {
  std::vector<EngineHere> found;
  for (const Engine* engine : engines()) {
    const std::string& absent = engine->device().absent;
    found.push_back(
        {std::string(engine->name), absent, absent.empty() ? engine->description() : ""});
  }
  return found;
}

std::vector<std::string> describe_machine() {
  std::vector<std::string> lines;
  for (const auto& [name, absent, description] : engines_here()) {
    lines.push_back(
        text("engine ", name, ": ", absent.empty() ? description : "not here: " + absent));
  }
  return lines;
}

std::vector<std::string> describe_tuning() {
  std::vector<std::string> lines;
  for (const Engine* engine : engines()) {
    for (const std::string& line : engine->tuning()) {
      lines.push_back(text("engine ", engine->name, ": ", line));
    }
  }
  return lines;
}

}  // namespace cutloss
