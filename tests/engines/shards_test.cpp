// A vocabulary in shards: each with statistics of its own, whose states are merged and closed, and
// with gradients of its own, of which those of E are added up. Together they are the whole's.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"

namespace cutloss::test {
namespace {

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* name, auto change) {
    Case c = with_size(3, 47, 519, 16, 2);
    change(c);
    // The parts of dE are added up, and dC is compared, before anything is rounded.
    c.problem.wanted.de.type = DType::f32;
    c.name = name;
    all.push_back(c);
  };
  add("plain", [](Case&) {});
  add("everything", [](Case& c) { add_everything(c); });
  add("bias", [](Case& c) {
    head_of(c.problem).has_bias = c.problem.wanted.dbias.wanted = true;
    c.lse_gradient = true;
  });
  add("argmax", [](Case& c) { c.problem.wanted.argmax = c.problem.wanted.entropy = true; });
  add("softcap", [](Case& c) {
    c.problem.transform.softcap = 2.0;
    c.problem.rows.has_temperature = true;
  });
  add("peaked", [](Case& c) { c.logits = LogitKind::peaked; });
  add("offset", [](Case& c) {
    c.logits = LogitKind::offset;
    c.problem.wanted.zbar = c.problem.upstream.zbar = true;
  });
  add("flat", [](Case& c) {
    c.logits = LogitKind::flat;
    c.problem.wanted.argmax = true;
  });
  add("mostly_ignored", [](Case& c) { c.ignored = 0.95; });
  add("all_ignored", [](Case& c) { c.ignored = 1; });
  return all;
}

// [first, first + count) of an array's rows of `width` elements.
Array rows_of(const Array& all, std::int64_t first, std::int64_t count, std::int64_t width) {
  Array part(all.type, count * width);
  const auto bytes = static_cast<std::size_t>(reference::bytes_of(all.type) * width);
  std::memcpy(part.buffer.data(), all.buffer.data() + static_cast<std::size_t>(first) * bytes,
              static_cast<std::size_t>(count) * bytes);
  return part;
}

// One shard: its own C, bias, plan, memory and gradients; the rows' outputs are everybody's.
struct Shard {
  Classes classes;
  Array c, bias;
  Plan plan;
  Outputs out;
  std::unique_ptr<Scratch> scratch;

  Shard(const Data& data, const Classes& its, const std::string& engine, const Mode& mode)
      : classes(its) {
    Problem p = data.problem;
    Head& head = head_of(p);
    c = rows_of(data.c, its.first, its.count, head.c_row_stride);
    if (head.has_bias) bias = rows_of(data.bias, its.first, its.count, 1);
    head.classes = its;
    p.wanted.state = true;
    plan = plan_for(p, engine, mode);
    out = outputs_for(plan.problem);
    scratch = std::make_unique<Scratch>(plan);
  }

  Args args(const Data& data, Outputs& rows, void* state, bool forward) {
    const Device device = plan.problem.device;
    Args a = args_for(data, out, *scratch, forward);
    a.rows = rows.rows(device);
    a.rows.state = state;
    a.in.c = c.on(device);
    if (head_of(plan.problem).has_bias) a.in.bias = bias.on(device);
    return a;
  }
};

// The states of all shards, one shard after the other.
class States {
 public:
  States(const Problem& p, std::int64_t shards)
      : device_(p.device),
        each_(row_count(p) * row_state_bytes(reference::stat_type(p))),
        memory_(shards * each_) {}
  void* of(std::int64_t shard) { return memory_.on(device_) + shard * each_; }

 private:
  Device device_;
  std::int64_t each_;
  Buffer memory_;
};

std::vector<Classes> split(std::int64_t V, const std::vector<std::int64_t>& ends) {
  std::vector<Classes> all;
  std::int64_t first = 0;
  for (const std::int64_t end : ends) {
    all.push_back({first, end - first, V});
    first = end;
  }
  return all;
}

// Everything that the whole would give. A shard of no classes has an empty state and no gradient.
Outputs run_sharded(const Data& data, const std::string& engine, const Mode& mode,
                    const std::vector<Classes>& split) {
  std::vector<std::unique_ptr<Shard>> shards;
  Problem whole = data.problem;
  set_engine(whole, engine);
  States states(whole, static_cast<std::int64_t>(split.size()));
  Outputs rows = outputs_for(whole);
  for (std::size_t k = 0; k < split.size(); ++k) {
    if (split[k].count == 0) {
      empty_states(whole.device, reference::stat_type(whole), row_count(whole),
                   states.of(static_cast<std::int64_t>(k)), nullptr);
      shards.push_back(nullptr);
      continue;
    }
    shards.push_back(std::make_unique<Shard>(data, split[k], engine, mode));
  }
  const auto each = [&](auto call) {
    for (std::size_t k = 0; k < shards.size(); ++k) {
      if (shards[k] != nullptr) call(*shards[k], states.of(static_cast<std::int64_t>(k)));
    }
  };
  const auto close_all = [&](RowList some) {
    const Inputs in = data.inputs(whole.device);
    close_rows(loss_rows(whole),
               {states.of(0), static_cast<std::int64_t>(split.size()), 0, in.targets,
                in.class_weight, some, nullptr},
               rows.rows(whole.device), nullptr);
  };
  bool joint = false;
  each([&](Shard& shard, void*) {
    joint = shard.plan.schedule == Schedule::rows && !shard.plan.keeps_logits;
  });
  if (joint) {
    std::vector<std::unique_ptr<Session>> sessions;
    std::int64_t chunks = 0;
    each([&](Shard& shard, void* state) {
      sessions.push_back(open(shard.plan, shard.args(data, rows, state, true), Pass::both));
      sessions.back()->begin();
      EXPECT_TRUE(chunks == 0 || chunks == chunk_count(shard.plan)) << "the shards' chunks differ";
      chunks = chunk_count(shard.plan);
    });
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (const auto& session : sessions) session->statistics(chunk);
      close_all(sessions[0]->rows(chunk));
      for (const auto& session : sessions) session->gradients(chunk);
    }
    for (const auto& session : sessions) session->finish();
  } else {
    each([&](Shard& shard, void* state) {
      forward(shard.plan, shard.args(data, rows, state, true));
    });
    close_all({});
    each([&](Shard& shard, void* state) {
      backward(shard.plan, shard.args(data, rows, state, false));
    });
  }
  rows.fetch();
  std::vector<double> de(static_cast<std::size_t>(rows.de.count), 0.0);
  for (std::size_t k = 0; k < shards.size(); ++k) {
    if (shards[k] == nullptr) continue;
    Outputs& part = shards[k]->out;
    part.fetch();
    EXPECT_TRUE(part.guards_intact() && shards[k]->scratch->intact());
    for (std::size_t i = 0; i < de.size(); ++i) de[i] += part.de.get(static_cast<std::int64_t>(i));
    const auto place = [&](Array& all, const Array& of, std::int64_t width) {
      for (std::int64_t i = 0; i < of.count; ++i) all.set(split[k].first * width + i, of.get(i));
    };
    place(rows.dc, part.dc, head_of(data.problem).D);
    place(rows.dbias, part.dbias, 1);
  }
  for (std::size_t i = 0; i < de.size(); ++i) rows.de.set(static_cast<std::int64_t>(i), de[i]);
  EXPECT_TRUE(rows.guards_intact());
  return rows;
}

using Shards = EverySubject;

TEST_P(Shards, TogetherAreTheWhole) {
  const Data data = make_data(GetParam().problem);
  const Truth truth(GetParam().engine, GetParam().problem, data);
  const std::int64_t V = classes_of(data.problem).count;
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    expect_accurate(run_sharded(data, GetParam().engine, mode, split(V, {V / 3, 2 * V / 3, V})),
                    data, truth);
    if (mode.upstream == Upstream::at_forward) continue;
    // Sizes of all kinds: none, one class, most of them.
    expect_accurate(run_sharded(data, GetParam().engine, mode, split(V, {300, 300, 301, V})), data,
                    truth);
  }
}

// What a rank that has everything makes of its one open state is what it makes without.
TEST_P(Shards, OneShardMakesTheWholesBits) {
  const Data data = make_data(GetParam().problem);
  const std::int64_t V = classes_of(data.problem).count;
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs whole = run(plan, data);
    EXPECT_EQ(run_sharded(data, GetParam().engine, mode, {{0, V, V}}).first_difference(whole), "")
        << mode.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, Shards, testing::ValuesIn(subjects(cases())), subject_name);

// A target that no class of the vocabulary has is wrong on every shard; one that no shard has has
// no logit.
TEST(Shard, TargetsOutsideAreErrorsOnTheCpu) {
  Data data = make_data(with_size(1, 5, 30, 8));
  data.set_target(3, 30);
  try {
    run_sharded(data, "cpu", kModes[4], split(30, {10, 20, 30}));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_value);
    EXPECT_NE(std::string(error.what()).find("is 30, outside [0, V = 30)"), std::string::npos)
        << error.what();
  }
}

TEST(Shard, ATargetInNoShardIsNaN) {
  Data data = make_data(with_size(1, 5, 30, 8));
  data.set_target(3, 15);
  data.set_target(4, 5);
  const Outputs out = run_sharded(data, "cpu", kModes[4], {{0, 10, 30}, {20, 10, 30}});
  EXPECT_TRUE(std::isnan(out.nll.get(3)));
  EXPECT_FALSE(std::isnan(out.nll.get(4)));
}

ErrorCode code_of(const Problem& problem) {
  try {
    make_plan(problem);
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::internal;
}

TEST(Shard, RefusesWhatIsNone) {
  const Data data = make_data(with_size(1, 5, 30, 8));
  Problem p = data.problem;
  p.upstream.when = Upstream::at_backward;
  p.wanted.state = true;
  classes_of(p) = {10, 30, 60};
  EXPECT_NO_THROW(make_plan(p));
  for (const Classes& wrong : {Classes{-1, 30, 60}, Classes{31, 30, 60}, Classes{0, 30, 29}}) {
    classes_of(p) = wrong;
    EXPECT_EQ(code_of(p), ErrorCode::invalid_value);
  }
  classes_of(p) = {10, 30, 60};
  p.wanted.state = false;  // a shard's rows can't be closed
  EXPECT_EQ(code_of(p), ErrorCode::invalid_value);

  const Plan plan = plan_for(
      [&] {
        Problem open = data.problem;
        open.wanted.state = true;
        return open;
      }(),
      "cpu", kModes[0]);
  Outputs out = outputs_for(plan.problem);
  Scratch scratch(plan);
  Args args = args_for(data, out, scratch, true);
  EXPECT_THROW(forward(plan, args), Error);  // rows.state is null
  Buffer state(row_count(plan.problem) * row_state_bytes(DType::f32));
  args.rows.state = state.data();
  EXPECT_THROW(forward_backward(plan, args), Error);  // it would close the rows itself
  args.rows.state = state.data() + 4;
  EXPECT_THROW(forward(plan, args), Error);
  const LossRows rows = loss_rows(plan.problem);
  const bool wrong_states = false;
  RowStates right;
  right.states = state.data();
  right.count = 1;
  right.targets = args.in.targets;
  EXPECT_NO_THROW(close_rows(rows, right, args.rows, nullptr));
  const auto refuses = [&](auto change) {
    RowStates wrong = right;
    change(wrong);
    EXPECT_THROW(close_rows(rows, wrong, args.rows, nullptr), Error);
  };
  refuses([](RowStates& s) { s.count = 0; });
  refuses([](RowStates& s) { s.stride = 4; });
  refuses([](RowStates& s) { s.states = nullptr; });
  refuses([](RowStates& s) { s.states = static_cast<const std::byte*>(s.states) + 4; });
  refuses([](RowStates& s) { s.targets = nullptr; });
  right.is_right = &wrong_states;
  close_rows(rows, right, args.rows, nullptr);
  for (std::int64_t n = 0; n < 5; ++n) EXPECT_TRUE(std::isnan(out.nll.get(n)));
  EXPECT_THROW(empty_states(Device::cpu, DType::f32, 5, nullptr, nullptr), Error);
  EXPECT_THROW(empty_states(Device::cpu, DType::bf16, 5, state.data(), nullptr), Error);
  EXPECT_THROW(row_state_bytes(DType::bf16), Error);
}

}  // namespace
}  // namespace cutloss::test
