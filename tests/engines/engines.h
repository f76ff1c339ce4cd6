// What every engine test is run over: each engine of this build that works on this machine's
// processor, each way of asking for gradients, each mix of dtypes.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "api/algorithms.h"
#include "cpu/decision.h"
#include "cpu/engine.h"
#include "plan/plan.h"
#ifdef CUTLOSS_CUDA
#include "cuda/decision.h"
#include "cuda/library/engine.h"
#endif
#include "problems.h"
#include "run.h"

namespace cutloss::test {

// The engines that work here: those for GPUs are in the build, but need one.
inline std::vector<std::string> engine_names() {
  std::vector<std::string> names;
  for (const Engine* engine : engines()) {
    Problem problem;
    problem.rows.length = classes_of(problem).count = head_of(problem).D = 128;
    problem.compute_type = head_of(problem).e_type = head_of(problem).c_type = DType::bf16;
    set_engine(problem, std::string(engine->name));
    if (refusal_of(*engine, problem, engine->device()).empty()) names.emplace_back(engine->name);
  }
  return names;
}

// The reference for an engine's results. A processor without bf16 or fp16 products takes fp32 ones,
// which round less: the reference, and the bounds with it, follow the operands' true dtype.
inline reference::Result truth_for(const std::string& engine, const Data& data) {
  Problem problem = data.problem;
  if (engine == "cpu") problem.compute_type = cpu::product_type(problem, cpu_engine.device());
#ifdef CUTLOSS_CUDA
  if (runs_on_gpu(engine)) {
    problem.compute_type = cuda::product_type(problem, cuda_library_engine.device());
  }
#endif
  return reference::evaluate(problem, data.inputs(), data.upstream64());
}

// An engine may leave some problems, and some schedules of those it takes, to others.
inline bool takes(const std::string& engine, Problem problem) {
  set_engine(problem, engine);
  const Engine& by = engine_named(engines(), engine);
  return refusal_of(by, problem, by.device()).empty();
}
inline bool takes(const std::string& engine, const Problem& problem, const Mode& mode) {
  const Engine& by = engine_named(engines(), engine);
  return std::ranges::any_of(by.algorithms, [&](const Algorithm* algorithm) {
    return algorithm->way.schedule == mode.schedule &&
           refusal_of(*algorithm, problem, by.device()).empty();
  });
}

inline std::vector<Mode> modes_of(const std::string& engine, const Problem& problem) {
  std::vector<Mode> modes;
  for (const Mode& mode : kModes) {
    if (takes(engine, problem, mode)) modes.push_back(mode);
  }
  return modes;
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
        if (takes(engine, problem_of(c))) all.push_back({engine, types, c});
      }
    }
  }
  return all;
}

// Those whose data lies in host memory, which a call reads before it writes anything.
inline std::vector<Subject> subjects_on_host(const std::vector<Case>& cases) {
  std::vector<Subject> all = subjects(cases);
  std::erase_if(all, [](const Subject& subject) { return runs_on_gpu(subject.engine); });
  return all;
}

class EverySubject : public testing::TestWithParam<Subject> {};

inline std::string subject_name(const testing::TestParamInfo<Subject>& info) {
  std::string engine = info.param.engine;
  std::replace(engine.begin(), engine.end(), '/', '_');
  return engine + "_" + info.param.types.name + "_" + info.param.problem.name;
}

}  // namespace cutloss::test
