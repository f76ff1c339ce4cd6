// What GPUs add: streams, graphs, what the host cannot check, counts that the host need not know.
#ifdef CUTLOSS_CUDA

#include <cmath>
#include <limits>
#include <thread>

#include "check.h"
#include "core/text.h"
#ifdef CUTLOSS_CUDA_SM90
#include "cuda/fused/decision.h"
#include "cuda/fused/engine.h"
#include "cuda/fused/targets.h"
#endif

namespace cutloss::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

std::vector<Subject> subjects_on_gpu(const std::vector<Case>& cases) {
  std::vector<Subject> all = subjects(cases);
  std::erase_if(all, [](const Subject& subject) { return !runs_on_gpu(subject.engine); });
  return all;
}

TEST(GpuEngines, AreTestedWhereThereIsAGpu) {
  for (const std::string& engine : engine_names()) {
    if (runs_on_gpu(engine)) return;
  }
  GTEST_SKIP() << describe_machine()[0];
}

#ifdef CUTLOSS_CUDA_SM90
TEST(GpuEngines, BookEnoughForTheSortOfTargets) {
  if (!cuda_fused_sm90_engine.device().absent.empty()) GTEST_SKIP() << describe_machine()[0];
  for (const int V : {3, 50000, 262144}) {
    for (int rows = 1; rows < 3000000; rows = rows * 5 / 4 + 1) {
      const std::int64_t needed = cuda::fused::needed_sort_bytes(rows, V);
      EXPECT_LE(needed, cuda::fused::target_sort_bytes(rows)) << rows << " rows";
    }
  }
}
#endif

#ifdef CUTLOSS_CUDA_SM90
// dE's product is the engine's own where slabs are narrow beside large N and D: here it is made to
// be.
using OwnDe = EverySubject;
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OwnDe);

TEST_P(OwnDe, IsWithinBounds) {
  const Data data = make_data(GetParam().problem);
  const Truth truth(GetParam().engine, GetParam().problem, data);
  for (const Mode& mode : {kModes[4], kModes[5]}) {  // by vocabulary
    SCOPED_TRACE(mode.name);
    Plan plan = plan_for(data.problem, GetParam().engine, mode);
    auto decision = std::make_shared<cuda::fused::FusedDecision>(
        static_cast<const cuda::fused::FusedDecision&>(*plan.decision));
    decision->makes_de_itself = true;
    // With few multiprocessors each cluster has tiles of dC and of dE.
    for (const int multiprocessors : {decision->multiprocessors, 10, 2}) {
      decision->multiprocessors = multiprocessors;
      plan.decision = decision;
      expect_accurate(plan, data, truth);
    }
  }
}

std::vector<Subject> subjects_with_own_de() {
  std::vector<Case> cases;
  for (const double ignored : {0.0, 0.01, 0.4, 1.0}) {
    Case c = with_size(1, 777, 3001, 200);
    c.ignored = ignored;
    c.name = "ignored_" + std::to_string(static_cast<int>(100 * ignored));
    cases.push_back(c);
  }
  Case scaled = with_size(3, 97, 1999, 392, 1);
  scaled.problem.transform.logit_scale = -0.6;
  head_of(scaled.problem).has_bias = scaled.problem.wanted.dbias.wanted = true;
  scaled.name = "scaled_with_bias";
  cases.push_back(scaled);
  Case frozen = with_size(1, 777, 3001, 200);
  frozen.problem.wanted.dc.wanted = false;
  frozen.name = "frozen";
  cases.push_back(frozen);
  std::vector<Subject> all = subjects(cases);
  std::erase_if(all, [](const Subject& subject) {
    return subject.engine != "cuda/fused_sm90" || subject.types.compute != DType::bf16;
  });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Engines, OwnDe, testing::ValuesIn(subjects_with_own_de()), subject_name);
#endif

std::vector<Case> cases() {
  Case plain = with_size(1, 391, 1043, 40);
  plain.name = "plain";
  Case everything = with_size(2, 67, 1043, 24, 1);
  add_everything(everything);
  everything.name = "everything";
  return {plain, everything};
}

std::int64_t valid_rows(const Data& data) {
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < row_count(data.problem); ++n) count += data.counts(n) ? 1 : 0;
  return count;
}

bool all_nan(const Array& array) {
  for (std::int64_t i = 0; i < array.count; ++i) {
    if (!std::isnan(array.get(i))) return false;
  }
  return true;
}

using Gpu = EverySubject;
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Gpu);

TEST_P(Gpu, SameBitsInAHundredRepetitions) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs first = run(plan, data);
    for (int i = 0; i < 100; ++i) ASSERT_EQ(run(plan, data).first_difference(first), "") << i;
  }
}

// All calls that a plan needs, on a stream.
void make_calls(const Plan& plan, Args forward_args, Args backward_args, void* stream) {
  forward_args.stream = backward_args.stream = stream;
  if (plan.schedule == Schedule::rows && !plan.keeps_logits) {
    forward_backward(plan, forward_args);
  } else {
    forward(plan, forward_args);
    backward(plan, backward_args);
  }
}

TEST_P(Gpu, SameBitsFromAGraph) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs eager = run(plan, data);  // the libraries have loaded what they need

    Outputs out = outputs_for(plan.problem);
    Scratch scratch(plan);
    const Args forward_args = args_for(data, out, scratch, /*forward=*/true);
    const Args backward_args = args_for(data, out, scratch, /*forward=*/false);
    gpu::wait();
    const gpu::Stream stream;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    gpu::check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), "capture");
    make_calls(plan, forward_args, backward_args, stream.get());
    gpu::check(cudaStreamEndCapture(stream.get(), &graph), "end of capture");
    gpu::check(cudaGraphInstantiate(&executable, graph, 0), "a graph");
    out.fetch();
    EXPECT_EQ(out.first_difference(outputs_for(plan.problem)), "") << "ran while captured";
    for (int i = 0; i < 2; ++i) {
      gpu::check(cudaGraphLaunch(executable, stream.get()), "replay");
      out.fetch();
      EXPECT_EQ(out.first_difference(eager), "") << "replay " << i;
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }
}

TEST_P(Gpu, SameBitsOnTwoStreamsAtOnce) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs want = run(plan, data);
    const gpu::Stream streams[2];
    Outputs out[2] = {outputs_for(plan.problem), outputs_for(plan.problem)};
    Scratch scratch[2] = {Scratch(plan), Scratch(plan)};
    Args args[2][2];
    for (int i = 0; i < 2; ++i) {
      args[i][0] = args_for(data, out[i], scratch[i], /*forward=*/true);
      args[i][1] = args_for(data, out[i], scratch[i], /*forward=*/false);
    }
    gpu::wait();
    for (int i = 0; i < 2; ++i) make_calls(plan, args[i][0], args[i][1], streams[i].get());
    for (int i = 0; i < 2; ++i) {
      out[i].fetch();
      EXPECT_EQ(out[i].first_difference(want), "") << "stream " << i;
    }
  }
}

TEST_P(Gpu, SameBitsWhateverTheWorkspaceHolds) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs want = run(plan, data);
    for (const int byte : {0x00, 0x7f, 0x3c}) {
      Outputs out = outputs_for(plan.problem);
      Scratch scratch(plan);
      for (Buffer* buffer : {&scratch.kept, &scratch.forward, &scratch.backward}) {
        if (buffer->bytes() > 0) std::memset(buffer->data(), byte, buffer->bytes());
      }
      make_calls(plan, args_for(data, out, scratch, true), args_for(data, out, scratch, false),
                 nullptr);
      out.fetch();
      EXPECT_EQ(out.first_difference(want), "") << "filled with " << byte;
    }
  }
}

TEST_P(Gpu, AnotherDeviceMakesTheSameBits) {
  int devices = 0;
  gpu::check(cudaGetDeviceCount(&devices), "counting devices");
  if (devices < 2) GTEST_SKIP() << "there is one device";
  for (const Mode& mode : modes_of(GetParam().engine, GetParam().problem.problem)) {
    SCOPED_TRACE(mode.name);
    const auto run_on = [&](int device) {
      gpu::check(cudaSetDevice(device), "choosing a device");
      const Data data = make_data(GetParam().problem);
      return run(plan_for(data.problem, GetParam().engine, mode), data);
    };
    const Outputs other = run_on(1);
    EXPECT_EQ(run_on(0).first_difference(other), "");
  }
}

// --- num_valid --------------------------------------------------------------------------------

TEST_P(Gpu, TheNumberOfValidRowsMayBeGiven) {
  for (const double ignored : {0.0, 0.4, 1.0}) {
    SCOPED_TRACE(ignored);
    Case c = GetParam().problem;
    c.ignored = ignored;
    Data data = make_data(c);
    const Truth truth(GetParam().engine, c, data);
    data.problem.rows.num_valid = valid_rows(data);
    for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
      SCOPED_TRACE(mode.name);
      expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
    }
  }
}

TEST_P(Gpu, AWrongNumberOfValidRowsMakesEverythingNaN) {
  Case c = GetParam().problem;
  for (const double ignored : {0.4, 1.0}) {
    c.ignored = ignored;
    Data data = make_data(c);
    const std::int64_t right = valid_rows(data);
    for (const std::int64_t wrong : {right - 1, right + 1, std::int64_t{0}}) {
      if (wrong == right || wrong < 0) continue;
      SCOPED_TRACE(text(wrong, " instead of ", right));
      data.problem.rows.num_valid = wrong;
      for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
        SCOPED_TRACE(mode.name);
        bool intact = false;
        const Outputs out = run(plan_for(data.problem, GetParam().engine, mode), data, &intact);
        EXPECT_TRUE(intact);
        for (const Array* array : {&out.nll, &out.lse, &out.row_max, &out.log_sum, &out.entropy,
                                   &out.zbar, &out.zbar_centred, &out.de, &out.dc, &out.dbias}) {
          EXPECT_TRUE(all_nan(*array));
        }
      }
    }
  }
}

// --- what the host cannot check ---------------------------------------------------------------

// Row `bad` is NaN, in everything that depends on it; the others are as they were.
void expect_one_bad_row(const Outputs& got, const Outputs& want, std::int64_t bad,
                        std::int64_t position, std::int64_t D) {
  for (std::int64_t n = 0; n < got.nll.count; ++n) {
    if (n == bad) {
      EXPECT_TRUE(std::isnan(got.nll.get(n)));
    } else {
      EXPECT_EQ(got.nll.get(n), want.nll.get(n)) << "row " << n;
      EXPECT_EQ(got.lse.get(n), want.lse.get(n)) << "row " << n;
    }
  }
  for (std::int64_t i = 0; i < got.de.count; ++i) {
    if (i / D == position) {
      ASSERT_TRUE(std::isnan(got.de.get(i))) << i;
    } else {
      ASSERT_EQ(got.de.get(i), want.de.get(i)) << i;
    }
  }
  EXPECT_TRUE(all_nan(got.dc));
  EXPECT_TRUE(all_nan(got.dbias));
}

TEST_P(Gpu, ATargetOutsideTheVocabularyMakesItsRowNaN) {
  Case c = GetParam().problem;
  for (const std::int64_t bad : {classes_of(c.problem).count, std::int64_t{-1}, std::int64_t{-101},
                                 std::int64_t{std::numeric_limits<std::int32_t>::max()}}) {
    for (const IndexType type : {IndexType::i32, IndexType::i64}) {
      SCOPED_TRACE(bad);
      c.problem.rows.target_type = type;
      Data data = make_data(c);
      const Problem& p = data.problem;
      const std::int64_t row = p.rows.shift == 0 ? 17 : p.rows.length - p.rows.shift + 5;
      const std::int64_t position = reference::position_of_row(p, row);
      // E of a row that counts.
      for (std::int64_t d = 0; d < head_of(p).D; ++d) data.e.set(data.e_offset(position) + d, 0.25);
      data.set_target(position + p.rows.shift, 3);
      for (Array* array :
           {&data.d_nll, &data.d_lse, &data.d_lse_squared, &data.d_entropy, &data.d_zbar}) {
        if (array->count > 0) array->set(row, 0.5);
      }
      for (const Mode& mode : modes_of(GetParam().engine, p)) {
        SCOPED_TRACE(mode.name);
        const Plan plan = plan_for(p, GetParam().engine, mode);
        data.set_target(position + p.rows.shift, 3);
        const Outputs want = run(plan, data);
        data.set_target(position + p.rows.shift, bad);
        bool intact = false;
        const Outputs got = run(plan, data, &intact);
        EXPECT_TRUE(intact);
        expect_one_bad_row(got, want, row, position, head_of(p).D);
        EXPECT_NEAR(got.lse.get(row), want.lse.get(row),
                    1e-5 * std::fabs(want.lse.get(row)) + 1e-5);
      }
    }
  }
}

TEST_P(Gpu, ATemperatureThatIsNotUsableMakesItsRowNaN) {
  Case c = GetParam().problem;
  c.problem.rows.has_temperature = true;
  c.ignored = 0;
  Data data = make_data(c);
  const Problem& p = data.problem;
  const std::int64_t row = 21;
  for (const double bad : {0.0, -0.5, kInf, std::nan(""), 1e-320}) {
    for (const Mode& mode : modes_of(GetParam().engine, p)) {
      SCOPED_TRACE(text(bad, ", ", mode.name));
      const Plan plan = plan_for(p, GetParam().engine, mode);
      data.temperature.set(row, 1.5);
      const Outputs want = run(plan, data);
      data.temperature.set(row, bad);
      expect_one_bad_row(run(plan, data), want, row, reference::position_of_row(p, row),
                         head_of(p).D);
    }
  }
}

// --- precision --------------------------------------------------------------------------------

TEST_P(Gpu, Tf32StaysWithinItsBounds) {
  if (GetParam().types.compute != DType::f32) return;  // it is an option of fp32 products
  const Case& c = GetParam().problem;
  Data data = make_data(c);
  data.problem.allow_tf32 = true;
  const Truth truth(GetParam().engine, c, data);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
  }
}

// Products of fp16 scale g so that coefficients of any size fit; more than 1e3 would not fit dC.
TEST_P(Gpu, CoefficientsOfAnySizeAreNotLost) {
  for (const double size : {1e-7, 1e3}) {
    SCOPED_TRACE(size);
    const Case& c = GetParam().problem;
    Data data = make_data(c);
    for (Array* array :
         {&data.d_nll, &data.d_lse, &data.d_lse_squared, &data.d_entropy, &data.d_zbar}) {
      for (std::int64_t n = 0; n < array->count; ++n) array->set(n, array->get(n) * size);
    }
    const Truth truth(GetParam().engine, c, data);
    for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
      SCOPED_TRACE(mode.name);
      expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, Gpu, testing::ValuesIn(subjects_on_gpu(cases())), subject_name);

// --- real sizes -------------------------------------------------------------------------------

// Large enough for the kernels that a library takes in earnest.
using GpuSizes = EverySubject;
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuSizes);

TEST_P(GpuSizes, WithinBounds) {
  const Case& c = GetParam().problem;
  const Data data = make_data(c);
  const Truth truth(GetParam().engine, c, data);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    expect_accurate(plan_for(data.problem, GetParam().engine, mode), data, truth);
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, GpuSizes,
                         testing::ValuesIn(subjects_on_gpu({with_size(1, 520, 5003, 128),
                                                            with_size(1, 260, 2500, 512)})),
                         subject_name);

// --- scaling ----------------------------------------------------------------------------------

TEST(GpuScale, MultipliesWhateverTheAlignment) {
  if (engine_names().size() < 2) GTEST_SKIP() << describe_machine()[0];
  constexpr DType kAll[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  for (const DType type : kAll) {
    for (const DType factor_type : kAll) {
      for (const std::int64_t offset : {0, 1, 3}) {
        for (const std::int64_t count : {0, 1, 7, 1000, 70001}) {
          SCOPED_TRACE(text(name(type), " ", name(factor_type), " ", offset, " ", count));
          std::mt19937_64 random(1);
          Array values = detail::random_array(type, offset + count + 5, -2, 2, random);
          Array factor(factor_type, 1);
          factor.set(0, 0.375);
          const std::vector<double> before = values.values();
          auto* begin = values.buffer.on(Device::cuda) + offset * reference::bytes_of(type);
          scale_in_place(Device::cuda, type, begin, count, factor_type, factor.on(Device::cuda),
                         nullptr);
          values.buffer.fetch();
          EXPECT_TRUE(values.buffer.guards_intact());
          for (std::int64_t i = 0; i < values.count; ++i) {
            const bool inside = i >= offset && i < offset + count;
            const double want = inside ? reference::rounded(before[i] * 0.375, type) : before[i];
            ASSERT_EQ(values.get(i), want) << i;
          }
        }
      }
    }
  }
}

TEST(GpuScale, LeavesEverythingWhereTheFactorIsOne) {
  if (engine_names().size() < 2) GTEST_SKIP() << describe_machine()[0];
  Array values(DType::bf16, 1000);  // poisoned: NaNs with their bits
  Array factor(DType::f32, 1);
  factor.set(0, 1);
  scale_in_place(Device::cuda, DType::bf16, values.on(Device::cuda), 1000, DType::f32,
                 factor.on(Device::cuda), nullptr);
  values.buffer.fetch();
  EXPECT_TRUE(values.buffer.same_bytes(Array(DType::bf16, 1000).buffer));
}

}  // namespace
}  // namespace cutloss::test

#endif  // CUTLOSS_CUDA
