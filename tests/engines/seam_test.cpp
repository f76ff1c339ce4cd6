// Calls taken apart: a session's begin, then statistics and gradients of each chunk, with the
// caller's coefficients written in between, then finish; in one session, or in a new one for each
// step.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engines.h"

namespace cutloss::test {
namespace {

std::vector<Case> cases() {
  Case plain = with_size(1, 391, 523, 16);
  plain.name = "plain";
  Case everything = with_size(3, 137, 523, 16, 2);
  add_everything(everything);
  everything.name = "everything";
  Case ignored = with_size(1, 391, 523, 16);
  ignored.ignored = 0.9;  // the last chunks are empty
  ignored.name = "mostly_ignored";
  return {plain, everything, ignored};
}

// fp16 gradients are made in backward: they have no seam.
std::vector<Subject> subjects_with_seam() {
  std::vector<Subject> all = subjects(cases());
  std::erase_if(all, [](const Subject& subject) {
    return subject.types.e == DType::f16 || subject.types.c == DType::f16 ||
           !takes(subject.engine, subject.problem.problem, kModes[1]);
  });
  return all;
}

Plan chunked_plan(const Data& data, const std::string& engine) {
  const Mode& in_chunks = kModes[1];
  return plan_for(data.problem, engine, in_chunks);
}

using Seam = EverySubject;

TEST_P(Seam, PiecesMakeTheSameBitsAsTheWhole) {
  const Data data = make_data(GetParam().problem);
  const Plan plan = chunked_plan(data, GetParam().engine);
  ASSERT_GT(chunk_count(plan), 1);
  const Outputs whole = run(plan, data);

  Outputs pieces = outputs_for(plan.problem);
  Scratch scratch(plan);
  const Args args = args_for(data, pieces, scratch, /*forward=*/true);
  const auto session = open(plan, args, Pass::both);
  session->begin();
  for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
    session->statistics(chunk);
    session->gradients(chunk);
  }
  session->finish();
  pieces.fetch();
  EXPECT_EQ(pieces.first_difference(whole), "");
  EXPECT_TRUE(scratch.intact() && pieces.guards_intact());
}

// forward takes such a plan as well: an evaluation between training steps needs no other.
TEST_P(Seam, ForwardAloneMakesTheSameStatistics) {
  const Data data = make_data(GetParam().problem);
  const Plan plan = chunked_plan(data, GetParam().engine);
  const Outputs whole = run(plan, data);
  Outputs alone = outputs_for(plan.problem);
  Scratch scratch(plan);
  Args args = args_for(data, alone, scratch, /*forward=*/true);
  args.gradients = {};
  forward(plan, args);
  alone.fetch();
  EXPECT_TRUE(alone.nll.buffer.same_bytes(whole.nll.buffer));
  EXPECT_TRUE(alone.lse.buffer.same_bytes(whole.lse.buffer));
  EXPECT_TRUE(alone.entropy.buffer.same_bytes(whole.entropy.buffer));
  EXPECT_TRUE(alone.zbar.buffer.same_bytes(whole.zbar.buffer));
  EXPECT_EQ(alone.argmax, whole.argmax);
}

// A list of rows, without the entries that stand for none.
std::vector<std::int64_t> rows_of(const RowList& list, Device device) {
  std::vector<std::int64_t> rows(list.count);
  if (device == Device::cpu) {
    std::copy_n(list.rows, list.count, rows.begin());
  } else if (list.count > 0) {
    gpu::copy(rows.data(), list.rows, list.count * sizeof(std::int64_t));
  }
  std::erase(rows, -1);
  return rows;
}

TEST_P(Seam, EveryRowThatCountsIsInOneChunk) {
  const Data data = make_data(GetParam().problem);
  const Plan plan = chunked_plan(data, GetParam().engine);
  Outputs out = outputs_for(plan.problem);
  Scratch scratch(plan);
  const Args args = args_for(data, out, scratch, /*forward=*/true);
  const auto session = open(plan, args, Pass::both);
  session->begin();
  std::vector<std::int64_t> seen;
  for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
    const RowList list = session->rows(chunk);
    EXPECT_LE(list.count, plan.chunk_rows);
    const std::vector<std::int64_t> rows = rows_of(list, plan.problem.device);
    seen.insert(seen.end(), rows.begin(), rows.end());
  }
  std::vector<std::int64_t> want;
  for (std::int64_t n = 0; n < row_count(plan.problem); ++n) {
    if (data.counts(n)) want.push_back(n);
  }
  EXPECT_EQ(seen, want);
}

// A focal loss, (1 - p_t)^2 nll: its coefficients are functions of the row's own nll, known only
// in the seam. The same coefficients given beforehand make the same bits.
TEST_P(Seam, CoefficientsMayComeFromTheChunksOwnStatistics) {
  Data data = make_data(GetParam().problem);
  const Plan plan = chunked_plan(data, GetParam().engine);
  const auto focal = [](double nll) {
    const double p = std::exp(-nll);
    return (1 - p) * (1 - p) + 2 * nll * p * (1 - p);
  };

  Outputs in_seam = outputs_for(plan.problem);
  {
    Scratch scratch(plan);
    std::fill_n(reinterpret_cast<unsigned char*>(data.d_nll.pointer()), data.d_nll.buffer.bytes(),
                static_cast<unsigned char>(0xff));
    const Args args = args_for(data, in_seam, scratch, /*forward=*/true);
    const auto session = open(plan, args, Pass::both);
    session->begin();
    for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
      session->statistics(chunk);
      in_seam.nll.buffer.fetch();
      for (const std::int64_t n : rows_of(session->rows(chunk), plan.problem.device)) {
        data.d_nll.set(n, focal(in_seam.nll.get(n)));
      }
      data.upstream(plan.problem.device);  // into the same memory
      session->gradients(chunk);
    }
    session->finish();
    in_seam.fetch();
  }
  EXPECT_EQ(run(plan, data).first_difference(in_seam), "");
}

TEST_P(Seam, RefusesPlansAndChunksThatHaveNone) {
  const Data data = make_data(GetParam().problem);
  const Plan plan = chunked_plan(data, GetParam().engine);
  Outputs out = outputs_for(plan.problem);
  Scratch scratch(plan);
  const Args args = args_for(data, out, scratch, /*forward=*/true);
  const auto session = open(plan, args, Pass::both);
  session->begin();
  EXPECT_THROW(session->statistics(1), Error);  // before those of chunk 0
  session->statistics(0);
  session->gradients(0);
  EXPECT_THROW(session->gradients(0), Error);  // they would be added once more
  session->statistics(1);
  EXPECT_THROW(session->gradients(0), Error);
  EXPECT_THROW(session->rows(-1), Error);
  EXPECT_THROW(session->statistics(-1), Error);
  EXPECT_THROW(session->gradients(chunk_count(plan)), Error);
  EXPECT_THROW(session->gradients(2), Error);                        // without its statistics
  EXPECT_THROW(open(plan, args, Pass::both)->statistics(0), Error);  // without begin
  EXPECT_THROW(open(plan, args, Pass::both)->finish(), Error);
  EXPECT_THROW(resume(plan, args, Pass::both)->begin(), Error);
  const auto forward_alone = open(plan, args, Pass::forward);
  forward_alone->begin();
  EXPECT_THROW(forward_alone->gradients(0), Error);
  EXPECT_THROW(forward_alone->finish(), Error);
  EXPECT_THROW(open(Plan(), args, Pass::both), Error);
  EXPECT_THROW(chunk_count(Plan()), Error);
  EXPECT_THROW(open(plan, args, Pass::backward), Error);
  EXPECT_THROW(backward(plan, args), Error);

  const Plan by_vocabulary = plan_for(data.problem, GetParam().engine, kModes[4]);
  EXPECT_THROW(open(by_vocabulary, args, Pass::both), Error);
  EXPECT_THROW(forward_backward(by_vocabulary, args), Error);
}

// Every algorithm: what a session leaves behind for the next is in memory that is booked for that
// long, and nowhere else. What is booked for less is written over between two steps.
void poison(const Ledger& ledger, std::byte* memory, Lifetime longest, Device device) {
  for (const Booking& booking : ledger.bookings()) {
    if (booking.lifetime > longest || booking.offset < 0) continue;
    const bool shares = !booking.lies_in.empty();
    if (shares && ledger.booking(booking.lies_in).lifetime > longest) continue;
    const auto bytes = static_cast<std::size_t>(booking.bytes);
    if (device == Device::cpu) {
      std::memset(memory + booking.offset, 0xff, bytes);
    } else {
      const std::vector<std::byte> nothing(bytes, std::byte{0xff});
      gpu::copy(memory + booking.offset, nothing.data(), bytes);
    }
  }
}

using Sessions = EverySubject;

TEST_P(Sessions, ASessionForEachStepMakesTheSameBits) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs whole = run(plan, data);
    Outputs pieces = outputs_for(plan.problem);
    Scratch scratch(plan);
    const bool joint = plan.schedule == Schedule::rows && !plan.keeps_logits;
    const Pass first = joint ? Pass::both : Pass::forward;
    const Args args = args_for(data, pieces, scratch, /*forward=*/true);
    const Decision& decision = *plan.decision;
    const auto spoil = [&](const Ledger& ledger, const Args& of, Lifetime longest) {
      poison(ledger, static_cast<std::byte*>(of.workspace), longest, plan.problem.device);
      poison(decision.kept, static_cast<std::byte*>(of.kept), longest, plan.problem.device);
    };
    open(plan, args, first)->begin();
    spoil(decision.forward, args, Lifetime::seam);
    for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
      resume(plan, args, first)->statistics(chunk);
      spoil(decision.forward, args, joint ? Lifetime::step : Lifetime::seam);
      if (!joint) continue;
      resume(plan, args, first)->gradients(chunk);
      spoil(decision.forward, args, Lifetime::seam);
    }
    if (joint) {
      resume(plan, args, first)->finish();
    } else if (plan.schedule != Schedule::none) {
      const Args then = args_for(data, pieces, scratch, /*forward=*/false);
      open(plan, then, Pass::backward)->begin();
      for (std::int64_t chunk = 0; chunk < chunk_count(plan); ++chunk) {
        spoil(decision.backward, then, Lifetime::seam);
        resume(plan, then, Pass::backward)->gradients(chunk);
      }
      spoil(decision.backward, then, Lifetime::seam);
      resume(plan, then, Pass::backward)->finish();
    }
    pieces.fetch();
    EXPECT_EQ(pieces.first_difference(whole), "") << mode.name << ", " << plan.algorithm;
    EXPECT_TRUE(scratch.intact() && pieces.guards_intact()) << mode.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, Sessions, testing::ValuesIn(subjects(cases())), subject_name);
INSTANTIATE_TEST_SUITE_P(Engines, Seam, testing::ValuesIn(subjects_with_seam()), subject_name);

}  // namespace
}  // namespace cutloss::test
