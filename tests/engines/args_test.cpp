// Bad arguments of a call: a clear error with the values in it, and nothing written.
#include <cmath>
#include <limits>

#include "engines.h"

namespace cutloss::test {
namespace {

Case every_option() {
  Case c = with_size(3, 20, 200, 8, 2);
  add_everything(c);
  c.name = "every_option";
  return c;
}

// The arguments of forward or backward, to be spoilt by a test.
struct Call {
  Data data;
  Plan plan;
  Outputs out;
  Scratch scratch;
  bool with_gradients;  // forward_backward or backward, else forward

  Call(const Subject& subject, const Mode& mode)
      : data(make_data(subject.problem)),
        plan(plan_for(data.problem, subject.engine, mode)),
        out(outputs_for(plan.problem)),
        scratch(plan),
        with_gradients(plan.schedule == Schedule::rows && !plan.keeps_logits) {}

  Args args() { return args_for(data, out, scratch, /*forward=*/true); }

  void make(const Args& args) const {
    with_gradients ? forward_backward(plan, args) : forward(plan, args);
  }

  // Makes the call, which must fail with a message that has all these parts.
  void expect_refusal(const Args& args, const std::vector<std::string>& parts) {
    const Outputs untouched = outputs_for(plan.problem);
    try {
      make(args);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_value) << error.what();
      for (const std::string& part : parts) {
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
            << "no '" << part << "' in: " << error.what();
      }
    }
    out.fetch();
    EXPECT_EQ(out.first_difference(untouched), "") << "was written";
  }
};

// The modes that differ in the calls they make, of those that the engine has.
std::vector<const Mode*> call_modes(const Subject& subject) {
  std::vector<const Mode*> modes = {&kModes[0], &kModes[4]};
  std::erase_if(modes, [&](const Mode* mode) {
    return !takes(subject.engine, subject.problem.problem, *mode);
  });
  return modes;
}

using BadArgs = EverySubject;
using BadData = EverySubject;

TEST_P(BadData, ATargetOutsideTheVocabulary) {
  for (const std::int64_t bad : {std::int64_t{200}, std::int64_t{-1}, std::int64_t{-101},
                                 std::int64_t{std::numeric_limits<std::int32_t>::max()}}) {
    for (const Mode* mode : call_modes(GetParam())) {
      for (const IndexType type : {IndexType::i32, IndexType::i64}) {
        Subject subject = GetParam();
        subject.problem.problem.rows.target_type = type;
        Call call(subject, *mode);
        call.data.set_target(2 * 20 + 7, bad);
        call.expect_refusal(call.args(), {"target", "(2, 7)", std::to_string(bad), "200", "-100"});
      }
    }
  }
}

// The first positions of a sequence are nobody's target under a shift.
TEST_P(BadArgs, ATargetThatIsNotPredictedIsNotRead) {
  for (const Mode* mode : call_modes(GetParam())) {
    Call call(GetParam(), *mode);
    call.data.set_target(20, 12345);
    call.data.set_target(21, -7);
    EXPECT_NO_THROW(call.make(call.args()));
  }
}

TEST_P(BadData, ATemperatureThatIsNotPositiveAndFinite) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const auto& [bad, text] : {std::pair{0.0, "0"}, std::pair{-0.5, "-0.5"},
                                  std::pair{inf, "inf"}, std::pair{std::nan(""), "nan"}}) {
    for (const Mode* mode : call_modes(GetParam())) {
      Call call(GetParam(), *mode);
      const std::int64_t row = 18 + 4;  // of the second sequence
      call.data.set_target(20 + 4 + 2, 3);
      call.data.temperature.set(row, bad);
      call.expect_refusal(call.args(), {"temperature", "(1, ", text, "> 0"});
    }
  }
}

TEST_P(BadArgs, AMissingPointer) {
  const std::pair<const char*, void (*)(Args&)> cases[] = {
      {"in.e", [](Args& a) { a.in.e = nullptr; }},
      {"in.c", [](Args& a) { a.in.c = nullptr; }},
      {"in.bias", [](Args& a) { a.in.bias = nullptr; }},
      {"in.targets", [](Args& a) { a.in.targets = nullptr; }},
      {"in.temperature", [](Args& a) { a.in.temperature = nullptr; }},
      {"in.class_weight", [](Args& a) { a.in.class_weight = nullptr; }},
      {"rows.nll", [](Args& a) { a.rows.nll = nullptr; }},
      {"rows.row_max", [](Args& a) { a.rows.row_max = nullptr; }},
      {"rows.log_sum", [](Args& a) { a.rows.log_sum = nullptr; }},
      {"rows.entropy", [](Args& a) { a.rows.entropy = nullptr; }},
      {"rows.zbar", [](Args& a) { a.rows.zbar = a.rows.zbar_centred = nullptr; }},
      {"rows.argmax", [](Args& a) { a.rows.argmax = nullptr; }},
      {"workspace", [](Args& a) { a.workspace = nullptr; }}};
  for (const auto& [name, spoil] : cases) {
    for (const Mode* mode : call_modes(GetParam())) {
      SCOPED_TRACE(std::string(name) + " " + mode->name);
      Call call(GetParam(), *mode);
      Args args = call.args();
      spoil(args);
      call.expect_refusal(args, {std::string("Args::") + name, "null"});
    }
  }
}

TEST_P(BadArgs, AMissingGradient) {
  const std::pair<const char*, void (*)(Args&)> cases[] = {
      {"gradients.de", [](Args& a) { a.gradients.de = nullptr; }},
      {"gradients.dc", [](Args& a) { a.gradients.dc = nullptr; }},
      {"gradients.dbias", [](Args& a) { a.gradients.dbias = nullptr; }}};
  for (const auto& [name, spoil] : cases) {
    SCOPED_TRACE(name);
    Call call(GetParam(), kModes[4]);
    forward(call.plan, call.args());
    Args args = args_for(call.data, call.out, call.scratch, /*forward=*/false);
    spoil(args);
    try {
      backward(call.plan, args);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
    call.out.fetch();
    EXPECT_TRUE(call.out.de.buffer.same_bytes(outputs_for(call.plan.problem).de.buffer));
    EXPECT_TRUE(call.out.dc.buffer.same_bytes(outputs_for(call.plan.problem).dc.buffer));
  }
}

TEST_P(BadArgs, MisalignedMemory) {
  for (const Mode& mode : modes_of(GetParam().engine, GetParam().problem.problem)) {
    SCOPED_TRACE(mode.name);
    Call call(GetParam(), mode);
    Args args = call.args();
    args.workspace = static_cast<std::byte*>(args.workspace) + 16;
    call.expect_refusal(args, {"workspace", "64 bytes"});
    if (call.plan.kept_bytes == 0) continue;
    args = call.args();
    args.kept = static_cast<std::byte*>(args.kept) + 4;
    call.expect_refusal(args, {"kept", "64 bytes"});
  }
}

TEST_P(BadArgs, AnUpstreamGradientThatThePlanDoesNotKnow) {
  for (const bool entropy : {true, false}) {
    Subject subject = GetParam();
    Problem& p = subject.problem.problem;
    (entropy ? p.upstream.entropy : p.upstream.zbar) = false;
    Call call(subject, kModes[4]);
    forward(call.plan, call.args());
    Args args = args_for(call.data, call.out, call.scratch, /*forward=*/false);
    (entropy ? args.upstream.d_entropy : args.upstream.d_zbar) = call.data.d_nll.pointer();
    try {
      backward(call.plan, args);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(entropy ? "upstream.entropy" : "upstream.zbar"),
                std::string::npos)
          << error.what();
    }
  }
}

// Pointers to outputs that the problem does not ask for are left alone, not filled with a number
// that looks like one.
TEST_P(BadArgs, OutputsThatAreNotWantedAreNotWritten) {
  Subject subject = GetParam();
  Problem& p = subject.problem.problem;
  p.wanted.entropy = p.wanted.zbar = p.wanted.argmax = p.upstream.entropy = p.upstream.zbar = false;
  for (const Mode* mode : call_modes(GetParam())) {
    SCOPED_TRACE(mode->name);
    Call call(subject, *mode);
    const DType stat = reference::stat_type(call.plan.problem);
    const std::int64_t rows = row_count(call.plan.problem);
    Array entropy(stat, rows), zbar(stat, rows), zbar_centred(stat, rows);
    Buffer argmax(row_count(call.plan.problem) * 8);
    const Device device = call.plan.problem.device;
    Args args = call.args();
    args.rows.entropy = entropy.on(device);
    args.rows.zbar = zbar.on(device);
    args.rows.zbar_centred = zbar_centred.on(device);
    args.rows.argmax = reinterpret_cast<std::int64_t*>(argmax.on(device));
    call.make(args);
    for (Buffer* buffer : {&entropy.buffer, &zbar.buffer, &zbar_centred.buffer, &argmax}) {
      buffer->fetch();
    }
    EXPECT_TRUE(entropy.buffer.same_bytes(Array(stat, entropy.count).buffer));
    EXPECT_TRUE(zbar.buffer.same_bytes(Array(stat, rows).buffer));
    EXPECT_TRUE(zbar_centred.buffer.same_bytes(Array(stat, rows).buffer));
    EXPECT_TRUE(argmax.same_bytes(Buffer(argmax.bytes())));
  }
}

// lse is a convenience: row_max and log_sum are what backward needs.
TEST_P(BadArgs, LseIsOptional) {
  for (const Mode* mode : call_modes(GetParam())) {
    Call call(GetParam(), *mode);
    Args args = call.args();
    args.rows.lse = nullptr;
    EXPECT_NO_THROW(call.make(args));
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, BadArgs, testing::ValuesIn(subjects({every_option()})),
                         subject_name);
INSTANTIATE_TEST_SUITE_P(Engines, BadData, testing::ValuesIn(subjects_on_host({every_option()})),
                         subject_name);

}  // namespace
}  // namespace cutloss::test
