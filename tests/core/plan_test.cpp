// Which schedule a problem gets, and what the plan says about it.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "core/text.h"
#include "plan/decision.h"
#include "problems.h"
#include "run.h"

namespace cutloss::test {
namespace {

Problem training() {
  Problem p = with_size(1, 1000, 20000, 64).problem;
  p.upstream.when = Upstream::at_forward;
  return p;
}

std::int64_t total_bytes(const Plan& plan) {
  return plan.kept_bytes + std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes);
}

std::int64_t smallest_for(Problem problem, Schedule schedule) {
  problem.schedule = schedule;
  return smallest_workspace(problem);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Plan, NoGradientMeansForwardAlone) {
  Problem p = training();
  p.wanted.de.wanted = p.wanted.dc.wanted = false;
  for (const Upstream upstream : {Upstream::none, Upstream::at_forward, Upstream::at_backward}) {
    p.upstream.when = upstream;
    const Plan plan = make_plan(p);
    EXPECT_EQ(plan.schedule, Schedule::none);
    EXPECT_EQ(plan.products, 1);
    EXPECT_FALSE(plan.keeps_logits);
    EXPECT_EQ(plan.kept_bytes, 0);
  }
}

TEST(Plan, TakesTheFewestProductsThatFit) {
  const Plan plan = make_plan(training());
  EXPECT_EQ(plan.schedule, Schedule::rows);
  EXPECT_FALSE(plan.keeps_logits);
  EXPECT_EQ(plan.products, 3);
  EXPECT_GT(plan.kept_bytes, 0);

  Problem frozen = training();
  frozen.wanted.dc.wanted = false;
  EXPECT_EQ(make_plan(frozen).products, 2);
}

TEST(Plan, UpstreamAtBackwardKeepsEveryLogitOrRecomputes) {
  Problem p = training();
  p.upstream.when = Upstream::at_backward;
  const Plan kept = make_plan(p);
  EXPECT_EQ(kept.schedule, Schedule::rows);
  EXPECT_TRUE(kept.keeps_logits);
  EXPECT_EQ(kept.products, 3);

  p.max_workspace = std::int64_t{16} << 20;  // less than 1000 x 20000 logits
  const Plan recomputed = make_plan(p);
  EXPECT_EQ(recomputed.schedule, Schedule::vocabulary);
  EXPECT_FALSE(recomputed.keeps_logits);
  EXPECT_EQ(recomputed.products, 4);
}

// fp16 gradients underflow without the loss scale, which only backward knows.
TEST(Plan, Fp16GradientsAreMadeInBackward) {
  Problem p = training();
  head_of(p).c_type = DType::f16;
  const Plan plan = make_plan(p);
  EXPECT_EQ(plan.schedule, Schedule::rows);
  EXPECT_TRUE(plan.keeps_logits);
  p.wanted.dc.wanted = false;
  EXPECT_FALSE(make_plan(p).keeps_logits) << "dE is fp32";
}

TEST(Plan, TightWorkspacesGoByVocabulary) {
  for (const Types& types : kTypes) {
    SCOPED_TRACE(types.name);
    Problem p = training();
    set_types(p, types);
    const std::int64_t rows = smallest_for(p, Schedule::rows);
    const std::int64_t vocabulary = smallest_for(p, Schedule::vocabulary);
    ASSERT_LT(vocabulary, rows);

    p.max_workspace = rows;
    EXPECT_EQ(make_plan(p).schedule, Schedule::rows);
    p.max_workspace = rows - 1;
    EXPECT_EQ(make_plan(p).schedule, Schedule::vocabulary);
    p.max_workspace = vocabulary;
    EXPECT_EQ(make_plan(p).schedule, Schedule::vocabulary);
    p.max_workspace = vocabulary - 1;
    EXPECT_THROW(make_plan(p), Error);
  }
}

TEST(Plan, TheErrorNamesTheBytesThatWouldDo) {
  for (const Schedule schedule : {Schedule::automatic, Schedule::rows, Schedule::vocabulary}) {
    SCOPED_TRACE(std::string(name(schedule)));
    Problem p = training();
    p.schedule = schedule;
    const std::int64_t enough = smallest_workspace(p);
    p.max_workspace = 1000;
    EXPECT_EQ(least_workspace(p), enough);
    try {
      make_plan(p);
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::workspace);
      EXPECT_TRUE(contains(error.what(), "1000 bytes")) << error.what();
      EXPECT_TRUE(contains(error.what(), std::to_string(enough) + " bytes")) << error.what();
    }
  }
}

TEST(Plan, StaysWithinTheGrantedBytes) {
  for (const Upstream upstream : {Upstream::at_forward, Upstream::at_backward}) {
    for (const Types& types : kTypes) {
      Problem p = training();
      p.upstream.when = upstream;
      head_of(p).has_bias = p.wanted.dbias.wanted = true;
      set_types(p, types);
      const std::int64_t least = smallest_workspace(p);
      for (std::int64_t bytes = least; bytes < std::int64_t{1} << 31; bytes += bytes / 3) {
        p.max_workspace = bytes;
        const Plan plan = make_plan(p);
        EXPECT_LE(total_bytes(plan), bytes) << types.name << "\n" << describe(plan);
      }
    }
  }
}

// More memory never makes a plan with more products.
TEST(Plan, MoreMemoryIsNeverMoreWork) {
  Problem p = training();
  int products = 4;
  for (std::int64_t bytes = smallest_workspace(p); bytes < std::int64_t{1} << 31; bytes *= 2) {
    p.max_workspace = bytes;
    const int now = make_plan(p).products;
    EXPECT_LE(now, products);
    products = now;
  }
  EXPECT_EQ(products, 3);
}

TEST(Plan, WithoutALimitEveryProblemGetsOne) {
  Problem p = with_size(1, 60000, 300000, 8192).problem;
  set_types(p, kTypes[1]);
  p.upstream.when = Upstream::at_backward;
  p.wanted.dc.type = DType::f32;
  p.wanted.dc.add = true;
  const Plan plan = make_plan(p);
  EXPECT_GT(total_bytes(plan), kDefaultWorkspace) << "dE's sums alone are more";
  EXPECT_EQ(plan.schedule, Schedule::vocabulary);

  // In a dC that is written the sums have a place.
  p.wanted.dc.add = false;
  EXPECT_LE(total_bytes(make_plan(p)), kDefaultWorkspace);
}

// dE's sums wait in the last rows of dC where there is no room for them, if dC is written at all.
TEST(Plan, SumsOfDeWaitInDc) {
  Problem p = training();
  set_types(p, kTypes[1]);
  p.schedule = Schedule::vocabulary;
  const Decision& roomy = *make_plan(p).decision;
  EXPECT_FALSE(roomy.has_de_sums_in_dc());
  const std::int64_t least = smallest_workspace(p);
  p.max_workspace = least;
  const Plan tight = make_plan(p);
  EXPECT_TRUE(tight.decision->has_de_sums_in_dc());
  EXPECT_LE(tight.decision->last.begin, 20000 - 2 * 1000) << "two rows of bf16 for one of fp32";
  EXPECT_GT(tight.predicted_time, roomy.predicted_time);
  EXPECT_TRUE(contains(describe(tight), "in dC until"));
  EXPECT_TRUE(contains(describe(tight), "on twice"));

  p.wanted.dc.type = DType::f32;
  p.wanted.dc.add = true;
  EXPECT_THROW(make_plan(p), Error) << "what is added to holds nothing else";

  // Without dC, dE is made of some rows after the others.
  p.wanted.dc = {};
  p.max_workspace = smallest_workspace(p);
  EXPECT_GT(chunk_count(make_plan(p)), 1);
}

TEST(Plan, TheScheduleAskedForIsTheScheduleGiven) {
  for (const Schedule schedule : {Schedule::rows, Schedule::vocabulary}) {
    Problem p = training();
    p.schedule = schedule;
    EXPECT_EQ(make_plan(p).schedule, schedule);
  }
}

TEST(Plan, FillsInStrides) {
  Problem p = with_size(3, 7, 50, 12).problem;
  p.upstream.when = Upstream::at_backward;
  const Head filled = head_of(make_plan(p).problem);
  EXPECT_EQ(filled.e_row_stride, 12);
  EXPECT_EQ(filled.e_sequence_stride, 84);
  EXPECT_EQ(filled.c_row_stride, 12);
  EXPECT_EQ(filled.classes, (Classes{0, 50, 50}));
}

TEST(Plan, ChunksCoverTheRows) {
  Problem p = training();
  p.max_workspace = smallest_for(p, Schedule::rows);
  const Plan plan = make_plan(p);
  ASSERT_EQ(plan.schedule, Schedule::rows);
  EXPECT_LT(plan.chunk_rows, row_count(p));
  EXPECT_GE(plan.chunk_rows * chunk_count(plan), row_count(p));
  EXPECT_LT(plan.chunk_rows * (chunk_count(plan) - 1), row_count(p));

  p.rows.length = 0;
  p.max_workspace.reset();
  EXPECT_EQ(chunk_count(make_plan(p)), 0);
}

TEST(Plan, DescribesItself) {
  Problem p = training();
  set_types(p, kTypes[1]);
  p.max_workspace = std::int64_t{8} << 20;
  const Plan plan = make_plan(p);
  ASSERT_EQ(plan.schedule, Schedule::vocabulary);
  const std::string text = describe(plan);
  for (const std::string& part :
       {std::string("N 1000"), std::string("V 20000"), std::string("D 64"), std::string("bf16"),
        std::string("engine cpu"), std::string("schedule vocabulary"), std::string("products 4"),
        std::string("algorithm cpu/by_vocabulary"),
        std::to_string(plan.decision->sizes.block_rows) + " rows",
        std::to_string(plan.decision->sizes.slab) + " columns",
        std::to_string(plan.forward_workspace_bytes) + " bytes",
        std::to_string(plan.backward_workspace_bytes) + " bytes",
        // Why not by rows: what it needs and what was granted.
        "rows, 3 products: needs at least " + std::to_string(smallest_for(p, Schedule::rows)),
        std::string("max_workspace is 8388608 bytes (8 MiB)")}) {
    EXPECT_TRUE(contains(text, part)) << "no '" << part << "' in\n" << text;
  }
  for (const std::string& reason : plan.reasons) EXPECT_TRUE(contains(text, reason));
}

TEST(Text, SaysMemoryInBytesAndInMiB) {
  EXPECT_EQ(memory_text(0), "0 bytes");
  EXPECT_EQ(memory_text(1048575), "1048575 bytes");
  EXPECT_EQ(memory_text(1048576), "1048576 bytes (1 MiB)");
  EXPECT_EQ(memory_text(14762048), "14762048 bytes (14.1 MiB)");
  EXPECT_EQ(memory_text(std::int64_t{3} << 40), "3298534883328 bytes (3145728 MiB)");
}

TEST(Plan, SaysWhereRowsLieApart) {
  Problem p = with_size(3, 7, 50, 16).problem;
  Head& head = head_of(p);
  p.upstream.when = Upstream::at_backward;
  EXPECT_FALSE(contains(describe(make_plan(p)), "apart"));
  head.e_sequence_stride = 200;
  EXPECT_TRUE(contains(describe(make_plan(p)), "\nsequences of E 200 elements apart\n"));
  head.e_row_stride = 24;
  head.c_row_stride = 19;
  EXPECT_TRUE(contains(describe(make_plan(p)),
                       "\nrows of E 24, sequences of E 200, rows of C 19 elements apart\n"));
  p.rows.sequences = p.rows.length = head.classes.count = 1;  // nothing to be apart from
  EXPECT_FALSE(contains(describe(make_plan(p)), "apart"));
}

TEST(Machine, NamesEveryEngineAndItsLibraries) {
  const std::vector<std::string> lines = describe_machine();
  ASSERT_FALSE(lines.empty());
  const std::string& cpu = lines.back();  // the engines for GPUs come first
  EXPECT_TRUE(contains(cpu, "engine cpu: "));
  EXPECT_TRUE(contains(cpu, "oneDNN"));
  EXPECT_TRUE(contains(cpu, "OpenBLAS"));
  EXPECT_TRUE(contains(cpu, "threads"));
}

TEST(Machine, PrintsWhatPlansAreTunedBy) {
  const std::vector<std::string> lines = describe_tuning();
  EXPECT_TRUE(std::ranges::any_of(lines, [](const std::string& line) {
    return contains(line, "engine cpu: tile of 2048 rows x 1024 columns");
  }));
}

TEST(Names, AreWhatTheApiCallsThem) {
  EXPECT_EQ(name(DType::f32), "f32");
  EXPECT_EQ(name(DType::f64), "f64");
  EXPECT_EQ(name(DType::bf16), "bf16");
  EXPECT_EQ(name(DType::f16), "f16");
  EXPECT_EQ(name(Schedule::automatic), "automatic");
  EXPECT_EQ(name(Schedule::none), "none");
  EXPECT_EQ(name(Schedule::rows), "rows");
  EXPECT_EQ(name(Schedule::vocabulary), "vocabulary");
}

TEST(RowCount, LeavesOutTheLastPositionsOfEachSequence) {
  EXPECT_EQ(row_count(with_size(3, 10, 5, 2).problem), 30);
  EXPECT_EQ(row_count(with_size(3, 10, 5, 2, 4).problem), 18);
  EXPECT_EQ(row_count(with_size(0, 10, 5, 2, 4).problem), 0);
}

}  // namespace
}  // namespace cutloss::test
