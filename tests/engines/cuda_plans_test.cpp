// Plans for GPUs, made where there may be none: of the facts of a device that the test gives.
#ifdef CUTLOSS_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "api/algorithms.h"
#include "core/text.h"
#include "cuda/decision.h"
#include "plan/plan.h"
#include "problems.h"
#ifdef CUTLOSS_CUDA_SM90
#include "cuda/fused/kernels.h"
#endif

namespace cutloss::test {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

DeviceFacts ampere() {
  DeviceFacts facts;
  facts.name = "A100";
  facts.sm = 80;
  facts.multiprocessors = 108;
  facts.l2_bytes = 40 * kMiB;
  facts.shared_bytes = 166912;
  facts.memory_rate = 2.0e12;
  return facts;
}

DeviceFacts hopper() {
  DeviceFacts facts;
  facts.name = "H200";
  facts.sm = 90;
  facts.multiprocessors = 132;
  facts.l2_bytes = 60 * kMiB;
  facts.shared_bytes = 232448;
  facts.memory_rate = 4.8e12;
  return facts;
}

Problem problem_on_gpu(std::int64_t N, std::int64_t D, std::int64_t V) {
  Problem p = with_size(1, N, V, D).problem;
  set_types(p, kTypes[1]);  // bf16
  p.device = Device::cuda;
  p.upstream.when = Upstream::at_backward;
  return p;
}

std::int64_t bytes_of(const Plan& plan) {
  return plan.kept_bytes + std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes);
}

Plan plan_in(Problem p, std::int64_t bytes, const DeviceFacts& device) {
  p.max_workspace = bytes;
  return make_plan(p, engines(), &device);
}

// What MEASURED problems of language models look like: N, D, V.
const std::vector<Problem>& models() {
  static const std::vector<Problem> all = {
      problem_on_gpu(8192, 4096, 131072), problem_on_gpu(8192, 2304, 256000),
      problem_on_gpu(8192, 1536, 131072), problem_on_gpu(4096, 2048, 151936)};
  return all;
}

TEST(CudaPlans, KeepToTheirBytesAndMoreIsNeverSlower) {
  for (const DeviceFacts& device : {ampere(), hopper()}) {
    for (const Problem& p : models()) {
      double before = 1e9;
      for (std::int64_t bytes = 16 * kMiB; bytes <= 8192 * kMiB; bytes += bytes / 4) {
        const Plan plan = plan_in(p, bytes, device);
        EXPECT_LE(bytes_of(plan), bytes) << describe(plan);
        // The fewest products are 3, and no plan may hide what memory could save.
        EXPECT_GE(plan.predicted_time, 3);
        EXPECT_LE(plan.predicted_time, before * 1.001) << describe(plan);
        before = std::min(before, plan.predicted_time);
      }
    }
  }
}

TEST(CudaPlans, NeedNoMoreThan16MiBWithDcWritten) {
  for (const DeviceFacts& device : {ampere(), hopper()}) {
    for (const Problem& p : models()) {
      const Plan plan = plan_in(p, 16 * kMiB, device);
#ifdef CUTLOSS_CUDA_SM90
      EXPECT_EQ(plan.algorithm,
                device.sm == 90 ? "cuda/fused/by_vocabulary" : "cuda/library/by_vocabulary");
#endif
      EXPECT_TRUE(plan.decision->has_de_sums_in_dc()) << describe(plan);
      EXPECT_LE(plan.predicted_time, device.sm == 90 ? 7 : 16) << describe(plan);
      EXPECT_LE(plan_in(p, 32 * kMiB, device).predicted_time, device.sm == 90 ? 5.2 : 8);
    }
  }
}

// Where memory is short forward has no g beside its logits, so its blocks are larger.
#ifdef CUTLOSS_CUDA_SM90
// Plain PyTorch holds at least the logits in 16 bits, and then their gradient. By rows a plan holds
// as much once, and little beside: cuBLASLt works in dC's memory until dC is written.
TEST(CudaPlans, ByRowsHoldLittleBesideTheExponentials) {
  const DeviceFacts device = hopper();
  const std::vector<Problem> all = {
      problem_on_gpu(1, 4096, 128256), problem_on_gpu(16, 4096, 128256),
      problem_on_gpu(256, 2048, 32064), problem_on_gpu(1024, 3072, 32064)};
  for (Problem p : all) {
    p.upstream.when = Upstream::at_forward;
    const Head& head = head_of(p);
    const std::int64_t N = row_count(p), V = head.classes.count;
    const Plan plan = make_plan(p, engines(), &device);
    EXPECT_EQ(plan.algorithm, "cuda/fused/exponentials") << describe(plan);
    EXPECT_EQ(plan.decision->forward.booking(cuda::buffer::kLibrary).lies_in, "dC");
    // The rows of E twice and of dE's sums, a number for each class, one for each tile of a row.
    const std::int64_t beside = N * (8 * head.D + V / 16) + 4 * V + kMiB / 2;
    EXPECT_LE(bytes_of(plan), 2 * N * (V + 8) + beside) << describe(plan);

    p.wanted.dc.add = true;  // what is added to may hold nothing else
    p.wanted.dc.type = DType::f32;
    const Plan adds = make_plan(p, engines(), &device);
    EXPECT_EQ(adds.decision->forward.booking(cuda::buffer::kLibrary).lies_in, "");
  }
}
#endif

TEST(CudaPlans, ForwardOfTheLibraryTakesLargerBlocks) {
  for (const Problem& p : models()) {
    const Plan plan = plan_in(p, 16 * kMiB, ampere());
    const auto& d = static_cast<const cuda::CudaDecision&>(*plan.decision);
    EXPECT_GT(d.forward_rows * d.forward_slab, d.sizes.block_rows * d.sizes.slab);
    EXPECT_GE(plan.forward_workspace_bytes, d.forward_rows * d.forward_slab * 4);
    EXPECT_LE(plan.forward_workspace_bytes, 16 * kMiB);
  }
}

// What is added to is never scratch: dE's sums need memory of their own then.
TEST(CudaPlans, SayWhatAnAddedDcCosts) {
  for (Problem p : models()) {
    const std::int64_t sums = row_count(p) * head_of(p).D * 4;
    p.wanted.dc.type = DType::f32;
    p.wanted.dc.add = true;
    EXPECT_THROW(plan_in(p, sums, hopper()), Error);
    const Plan plan = plan_in(p, sums + 64 * kMiB, hopper());
    EXPECT_FALSE(plan.decision->has_de_sums_in_dc());
    EXPECT_NE(describe(plan).find("dE's sums take " + memory_text(sums) +
                                  " of their own, since dC is "
                                  "added to"),
              std::string::npos)
        << describe(plan);
  }
}

TEST(CudaPlans, FrozenClassifierGoesByChunksOfRows) {
  for (Problem p : models()) {
    p.wanted.dc.wanted = false;
    p.schedule = Schedule::vocabulary;
    const Plan plan = plan_in(p, 32 * kMiB, hopper());
    EXPECT_GT(chunk_count(plan), 1) << describe(plan);
    EXPECT_EQ(plan.products, 3);
  }
}

TEST(CudaPlans, TakeTheEngineThatCan) {
  const auto engine_of = [](auto change, const DeviceFacts& device) {
    Problem p = problem_on_gpu(1000, 256, 5000);
    change(p);
    return make_plan(p, engines(), &device).engine;
  };
  const auto nothing = [](Problem&) {};
  EXPECT_EQ(engine_of(nothing, ampere()), "cuda/library");
#ifdef CUTLOSS_CUDA_SM90
  EXPECT_EQ(engine_of(nothing, hopper()), "cuda/fused_sm90");
#endif
  for (void (*change)(Problem&) :
       {+[](Problem& p) { set_types(p, kTypes[0]); }, +[](Problem& p) { head_of(p).D = 250; },
        +[](Problem& p) { p.transform.softcap = 300; }}) {
    EXPECT_EQ(engine_of(change, hopper()), "cuda/library");
  }
  DeviceFacts old = ampere();
  old.sm = 70;
  EXPECT_THROW(engine_of(nothing, old), Error);
  DeviceFacts none;
  none.absent = "no CUDA device";
  EXPECT_THROW(engine_of(nothing, none), Error);
  Problem elsewhere = problem_on_gpu(10, 8, 10);
  elsewhere.device_index = 3;
  const DeviceFacts device = hopper();
  EXPECT_THROW(make_plan(elsewhere, engines(), &device), Error);
}

#ifdef CUTLOSS_CUDA_SM90
// However many rows count, partial statistics have a place.
TEST(CudaPlans, PartialStatisticsFitForEveryNumberOfRows) {
  for (const int multiprocessors : {2, 78, 114, 132, 144}) {
    for (int rows = 1; rows < 60000; rows = rows * 3 / 2 + 1) {
      const cuda::fused::Grid grid =
          cuda::fused::sm90::kernels.grid(multiprocessors, rows, 1000, true);
      std::int64_t most = 0;
      const int blocks = (rows + grid.block_rows() - 1) / grid.block_rows();
      for (int b = 1; b <= blocks; ++b) {
        const auto walk = cuda::fused::TileWalk::make(b, 1, grid.clusters(), grid.largest_group);
        std::int64_t entries = 0;
        for (int r = 0; r < walk.runs; ++r) {
          const int end = r + 1 < walk.runs ? walk.run[r + 1].first_block : b;
          entries += std::int64_t{end - walk.run[r].first_block} * grid.block_rows() *
                     grid.slots() * walk.sharers(r);
        }
        most = std::max(most, entries);
      }
      EXPECT_EQ(cuda::fused::partial_entries(grid, rows), most) << multiprocessors << ", " << rows;
    }
  }
}

// Every tile of two products in one kernel is taken once, and no cluster ends after the time that
// plans foretell.
TEST(CudaPlans, TwoProductsInOneKernelShareTheClusters) {
  using cuda::fused::TileWalk;
  using cuda::fused::TwoWalks;
  for (const int clusters : {1, 5, 66}) {
    for (const int longs : {0, 1, 24, 66, 71, 176}) {
      for (const int shorts : {0, 3, 256, 704}) {
        for (const auto& [long_time, short_time] : {std::pair{129, 13}, {129, 33}, {17, 49}}) {
          const auto walk = [&](int tiles) { return TileWalk::make(tiles, 1, clusters, 1); };
          const TwoWalks walks = TwoWalks::make(walk(longs), walk(shorts), long_time, short_time);
          std::vector<int> taken[2] = {std::vector<int>(shorts), std::vector<int>(longs)};
          std::int64_t most = 0;
          for (int cluster = 0; cluster < clusters; ++cluster) {
            std::int64_t time = 0;
            for (int number = 0;; ++number) {
              const TwoWalks::Item item = walks.at(cluster, number);
              if (item.tile < 0) break;
              ++taken[item.is_long].at(static_cast<std::size_t>(item.tile));
              time += item.is_long ? long_time : short_time;
            }
            most = std::max(most, time);
          }
          EXPECT_EQ(taken[0], std::vector<int>(shorts, 1));
          EXPECT_EQ(taken[1], std::vector<int>(longs, 1));
          EXPECT_EQ(walks.time(long_time, short_time), most)
              << clusters << " clusters, " << longs << " and " << shorts << " tiles";
        }
      }
    }
  }
}
#endif

}  // namespace
}  // namespace cutloss::test
#endif
