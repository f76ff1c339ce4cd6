// Runs a plan on a problem's data, the way a caller would, with every output and every byte of
// workspace poisoned beforehand, in the memory of the plan's device.
#pragma once

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "cutloss/cutloss.h"
#include "problems.h"

namespace cutloss::test {

// How the gradients of a problem are asked for.
struct Mode {
  const char* name;
  Schedule schedule;
  Upstream upstream;
  bool smallest_workspace;  // the least that make_plan accepts; else 64 MiB
};

inline constexpr Mode kModes[] = {
    {"rows", Schedule::rows, Upstream::at_forward, false},
    {"rows_in_chunks", Schedule::rows, Upstream::at_forward, true},
    {"rows_kept", Schedule::rows, Upstream::at_backward, false},
    {"rows_kept_tight", Schedule::rows, Upstream::at_backward, true},
    {"vocabulary", Schedule::vocabulary, Upstream::at_backward, false},
    {"vocabulary_tight", Schedule::vocabulary, Upstream::at_backward, true},
};

// The least max_workspace that make_plan accepts.
inline std::int64_t smallest_workspace(Problem problem) {
  const auto fits = [&](std::int64_t bytes) {
    problem.max_workspace = bytes;
    try {
      make_plan(problem);
      return true;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::workspace) throw;
      return false;
    }
  };
  std::int64_t low = -1, high = 1;
  while (!fits(high)) {
    low = high;
    high *= 2;
  }
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (fits(middle) ? high : low) = middle;
  }
  return high;
}

inline bool runs_on_gpu(const std::string& engine) { return engine.starts_with("cuda/"); }

inline void set_engine(Problem& problem, const std::string& engine) {
  problem.engine = engine;
  problem.device = runs_on_gpu(engine) ? Device::cuda : Device::cpu;
}

inline Plan plan_for(Problem problem, const std::string& engine, const Mode& mode) {
  set_engine(problem, engine);
  problem.schedule = mode.schedule;
  problem.upstream.when = mode.upstream;
  problem.max_workspace =
      mode.smallest_workspace ? smallest_workspace(problem) : std::int64_t{64} << 20;
  return make_plan(problem);
}

struct Outputs {
  Array nll, lse, row_max, log_sum, entropy, zbar, zbar_centred;
  std::vector<std::int64_t> argmax;  // after fetch
  Buffer argmax_memory;
  Array de, dc, dbias;

  RowOutputs rows(Device device) {
    RowOutputs out;
    out.nll = nll.on(device);
    out.lse = lse.on(device);
    out.row_max = row_max.on(device);
    out.log_sum = log_sum.on(device);
    out.entropy = entropy.on(device);
    out.zbar = zbar.on(device);
    out.zbar_centred = zbar_centred.on(device);
    out.argmax = reinterpret_cast<std::int64_t*>(argmax_memory.on(device));
    return out;
  }

  Gradients gradients(Device device) { return {de.on(device), dc.on(device), dbias.on(device)}; }

  // What a call wrote, from wherever it was written to. Waits for a GPU.
  void fetch() {
    for (Array* array :
         {&nll, &lse, &row_max, &log_sum, &entropy, &zbar, &zbar_centred, &de, &dc, &dbias}) {
      array->buffer.fetch();
    }
    argmax_memory.fetch();
    argmax.resize(static_cast<std::size_t>(argmax_memory.bytes()) / sizeof(std::int64_t));
    if (!argmax.empty()) {
      std::memcpy(argmax.data(), argmax_memory.data(), argmax.size() * sizeof(std::int64_t));
    }
  }

  bool guards_intact() const {
    for (const Array* array :
         {&nll, &lse, &row_max, &log_sum, &entropy, &zbar, &zbar_centred, &de, &dc, &dbias}) {
      if (!array->buffer.guards_intact()) return false;
    }
    return argmax_memory.guards_intact();
  }

  // The name of the first output whose bytes differ; empty where none does.
  std::string first_difference(const Outputs& other) const {
    const std::pair<const char*, const Array* (*)(const Outputs&)> arrays[] = {
        {"nll", [](const Outputs& o) { return &o.nll; }},
        {"lse", [](const Outputs& o) { return &o.lse; }},
        {"row_max", [](const Outputs& o) { return &o.row_max; }},
        {"log_sum", [](const Outputs& o) { return &o.log_sum; }},
        {"entropy", [](const Outputs& o) { return &o.entropy; }},
        {"zbar", [](const Outputs& o) { return &o.zbar; }},
        {"zbar_centred", [](const Outputs& o) { return &o.zbar_centred; }},
        {"de", [](const Outputs& o) { return &o.de; }},
        {"dc", [](const Outputs& o) { return &o.dc; }},
        {"dbias", [](const Outputs& o) { return &o.dbias; }}};
    for (const auto& [name, of] : arrays) {
      if (!of(*this)->buffer.same_bytes(of(other)->buffer)) return name;
    }
    return argmax == other.argmax ? "" : "argmax";
  }
};

// Outputs that are not wanted stay null.
inline Outputs outputs_for(const Problem& p) {
  const Head& head = head_of(p);
  const std::int64_t N = row_count(p);
  const DType stat = reference::stat_type(p);
  Outputs out;
  for (Array* array : {&out.nll, &out.lse, &out.row_max, &out.log_sum}) *array = Array(stat, N);
  if (p.wanted.entropy) out.entropy = Array(stat, N);
  if (p.wanted.zbar) out.zbar = Array(stat, N);
  if (p.wanted.zbar) out.zbar_centred = Array(stat, N);
  if (p.wanted.argmax) {
    out.argmax_memory = Buffer(N * 8);
    out.argmax.assign(N, -7);  // no value that an engine writes
    if (N > 0) std::memcpy(out.argmax_memory.data(), out.argmax.data(), N * 8);
  }
  if (p.wanted.de.wanted) out.de = Array(de_type(p), p.rows.sequences * p.rows.length * head.D);
  if (p.wanted.dc.wanted) out.dc = Array(dc_type(p), head.classes.count * head.D);
  if (p.wanted.dbias.wanted) out.dbias = Array(dbias_type(p), head.classes.count);
  const auto fill = [](const GradientWanted& gradient, Array& array) {
    for (std::int64_t i = 0; gradient.add && i < array.count; ++i) array.set(i, added_to(i));
  };
  fill(p.wanted.dc, out.dc);
  fill(p.wanted.dbias, out.dbias);
  return out;
}

// Memory of a call, poisoned.
struct Scratch {
  Device device;
  Buffer kept, forward, backward;
  explicit Scratch(const Plan& plan)
      : device(plan.problem.device),
        kept(plan.kept_bytes),
        forward(plan.forward_workspace_bytes),
        backward(plan.backward_workspace_bytes) {}
  bool intact() const {
    return kept.guards_intact() && forward.guards_intact() && backward.guards_intact();
  }
};

// Where the call is one to a GPU: Outputs::fetch before its results are looked at.
inline Args args_for(const Data& data, Outputs& out, Scratch& scratch, bool forward) {
  const Device device = scratch.device;
  Args args;
  args.in = data.inputs(device);
  args.rows = out.rows(device);
  args.upstream = data.upstream(device);
  args.gradients = out.gradients(device);
  args.kept = scratch.kept.on(device);
  args.workspace = (forward ? scratch.forward : scratch.backward).on(device);
  return args;
}

// Forward, and backward where the plan makes gradients, on a CUDA stream or the default one.
// Sets *intact to whether everything outside the promised memory was left alone.
inline Outputs run(const Plan& plan, const Data& data, bool* intact = nullptr,
                   void* stream = nullptr) {
  Outputs out = outputs_for(plan.problem);
  Scratch scratch(plan);
  Args args = args_for(data, out, scratch, /*forward=*/true);
  args.stream = stream;
  if (plan.schedule == Schedule::rows && !plan.keeps_logits) {
    forward_backward(plan, args);
  } else {
    forward(plan, args);
    if (plan.schedule != Schedule::none) {
      args = args_for(data, out, scratch, /*forward=*/false);
      args.stream = stream;
      backward(plan, args);
    }
  }
  out.fetch();
  if (intact != nullptr) *intact = scratch.intact() && out.guards_intact();
  return out;
}

}  // namespace cutloss::test
