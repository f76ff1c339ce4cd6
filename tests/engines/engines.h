// What every engine test is run over: each engine of this build that works on this machine's
// processor, each way of asking for gradients, each mix of dtypes.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/engine.h"
#include "cpu/layout.h"
#include "problems.h"
#include "run.h"

namespace cutloss::test {

inline std::vector<std::string> engine_names() {
  std::vector<std::string> names;
  for (const Engine* engine : engines()) names.emplace_back(engine->name());
  return names;
}

// The reference for an engine's results. A processor without bf16 or fp16 products takes fp32 ones,
// which round less: the reference, and the bounds with it, follow the operands' true dtype.
inline reference::Result truth_for(const std::string& engine, const Data& data) {
  Problem problem = data.problem;
  if (engine == "cpu") problem.compute_type = cpu::product_type(problem);
  return reference::evaluate(problem, data.inputs(), data.upstream64());
}

// The modes are looped over inside a test, so that the reference is computed once for all.
struct Subject {
  std::string engine;
  Types types;
  Case problem;
};

inline void PrintTo(const Subject& subject, std::ostream* out) {
  *out << subject.engine << " " << subject.types.name << " " << subject.problem.name;
}

// Every engine with every mix of dtypes, on each of these cases.
inline std::vector<Subject> subjects(const std::vector<Case>& cases) {
  std::vector<Subject> all;
  for (const std::string& engine : engine_names()) {
    for (const Types& types : kTypes) {
      for (Case c : cases) {
        set_types(c.problem, types);
        all.push_back({engine, types, c});
      }
    }
  }
  return all;
}

class EverySubject : public testing::TestWithParam<Subject> {};

inline std::string subject_name(const testing::TestParamInfo<Subject>& info) {
  return info.param.engine + "_" + info.param.types.name + "_" + info.param.problem.name;
}

}  // namespace cutloss::test
