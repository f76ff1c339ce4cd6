// The same bits, call after call: for the same inputs and plan, whatever lies in the workspace
// and however many threads there are.
#include <omp.h>

#include <thread>

#include "cpu/gemm/gemm.h"
#include "engines.h"

namespace cutloss::test {
namespace {

std::vector<Case> cases() {
  Case plain = with_size(1, 131, 1043, 40);
  plain.name = "plain";
  Case everything = with_size(2, 67, 1043, 24, 1);
  add_everything(everything);
  everything.name = "everything";
  Case tall = with_size(1, 6007, 301, 8);  // more rows than one block sorts by target
  tall.name = "tall";
  return {plain, everything, tall};
}

class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

Array product(const cpu::Product& shape, DType type, int thread_count) {
  std::mt19937_64 random(3);
  const Array a = detail::random_array(type, shape.M * shape.K, -1, 1, random);
  const Array b = detail::random_array(type, shape.K * shape.N, -1, 1, random);
  cpu::Product p = shape;
  p.type = type;
  p.c_type = type == DType::f64 ? DType::f64 : DType::f32;
  p.a = {a.pointer(), p.a.transposed ? p.M : p.K, p.a.transposed};
  p.b = {b.pointer(), p.b.transposed ? p.K : p.N, p.b.transposed};
  Array c(p.c_type, p.M * p.N);
  p.c = c.pointer();
  p.c_stride = p.N;
  const Threads threads(thread_count);
  cpu::multiply(p);
  return c;
}

// Whether the library behind an engine multiplies to other bits with another number of threads, at
// products of the shapes that the cases below have. The engine is to add no difference to that.
bool product_depends_on_threads(const Problem& problem) {
  constexpr std::int64_t kRows = 131, kColumns = 1043;
  const std::int64_t D = head_of(problem).D;
  cpu::Product logits{}, de{}, dc{};
  logits.M = kRows, logits.N = kColumns, logits.K = D, logits.b.transposed = true;
  de.M = kRows, de.N = D, de.K = kColumns;
  dc.M = kColumns, dc.N = D, dc.K = kRows, dc.a.transposed = true;
  const DType type = cpu::product_type(problem, cpu_engine.device());
  for (const cpu::Product& shape : {logits, de, dc}) {
    const Array alone = product(shape, type, 1);
    for (const int count : {2, 3, 5}) {
      if (!product(shape, type, count).buffer.same_bytes(alone.buffer)) return true;
    }
  }
  return false;
}

using Determinism = EverySubject;

TEST_P(Determinism, SameBitsOnRepetition) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs first = run(plan, data);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(run(plan, data).first_difference(first), "");
  }
}

using DeterminismOnHost = EverySubject;

TEST_P(DeterminismOnHost, SameBitsWithAnyNumberOfThreads) {
  if (product_depends_on_threads(GetParam().problem.problem)) {
    GTEST_SKIP() << "the library's own product of "
                 << name(cpu::product_type(GetParam().problem.problem, cpu_engine.device()))
                 << " matrices differs between 1 and more threads";
  }
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs alone = [&] {
      const Threads threads(1);
      return run(plan, data);
    }();
    for (const int count : {2, 3, 5}) {
      const Threads threads(count);
      EXPECT_EQ(run(plan, data).first_difference(alone), "") << count << " threads";
    }
  }
}

// Backward reads what forward wrote and writes gradients only: it may be called again.
TEST_P(Determinism, SameBitsFromASecondBackward) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    if (mode.upstream == Upstream::at_forward) continue;
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    Outputs out = outputs_for(plan.problem);
    Scratch scratch(plan);
    forward(plan, args_for(data, out, scratch, /*forward=*/true));
    const auto gradients_again = [&] {
      out.de = outputs_for(plan.problem).de;  // poisoned anew
      out.dc = outputs_for(plan.problem).dc;
      scratch.backward = Buffer(plan.backward_workspace_bytes);
      backward(plan, args_for(data, out, scratch, /*forward=*/false));
      out.fetch();
      return std::pair(out.de.values(), out.dc.values());
    };
    const auto first = gradients_again();
    EXPECT_EQ(gradients_again(), first);
  }
}

// No call waits for another or disturbs it: autograd runs backward on a thread of its own.
TEST_P(Determinism, SameBitsFromManyCallersAtOnce) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : modes_of(GetParam().engine, data.problem)) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs alone = run(plan, data);
    std::vector<std::string> differences(3);
    std::vector<std::thread> callers;
    for (std::string& difference : differences) {
      callers.emplace_back([&] { difference = run(plan, data).first_difference(alone); });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::string& difference : differences) EXPECT_EQ(difference, "");
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, Determinism, testing::ValuesIn(subjects(cases())), subject_name);
INSTANTIATE_TEST_SUITE_P(Engines, DeterminismOnHost, testing::ValuesIn(subjects_on_host(cases())),
                         subject_name);

}  // namespace
}  // namespace cutloss::test
