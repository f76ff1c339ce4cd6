// The same bits, call after call: for the same inputs and plan, whatever lies in the workspace
// and however many threads there are.
#include <omp.h>

#include "cpu/gemm.h"
#include "engines.h"

namespace cutloss::test {
namespace {

std::vector<Case> cases() {
  Case plain = with_size(1, 131, 1043, 40);
  plain.name = "plain";
  Case everything = with_size(2, 67, 1043, 24, 1);
  add_everything(everything);
  everything.name = "everything";
  return {plain, everything};
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

// Whether the library behind an engine multiplies to the same bits with any number of threads.
// Ours is to add no other difference to it.
bool product_depends_on_threads(const std::string& engine, DType compute_type) {
  if (engine != "cpu" || compute_type != DType::f64) return false;
  constexpr std::int64_t M = 131, N = 1043, K = 40;
  std::mt19937_64 random(3);
  const Array a = detail::random_array(DType::f64, M * K, -1, 1, random);
  const Array b = detail::random_array(DType::f64, N * K, -1, 1, random);
  const auto product = [&](int count) {
    const Threads threads(count);
    Array c(DType::f64, M * N);
    cpu::Product p{};
    p.M = M;
    p.N = N;
    p.K = K;
    p.a = {a.pointer(), K, false};
    p.b = {b.pointer(), K, true};
    p.c = c.pointer();
    p.c_stride = N;
    p.type = DType::f64;
    cpu::multiply(p);
    return c;
  };
  const Array alone = product(1);
  for (const int count : {2, 3, 5}) {
    if (!product(count).buffer.same_bytes(alone.buffer)) return true;
  }
  return false;
}

using Determinism = EverySubject;

TEST_P(Determinism, SameBitsOnRepetition) {
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : kModes) {
    SCOPED_TRACE(mode.name);
    const Plan plan = plan_for(data.problem, GetParam().engine, mode);
    const Outputs first = run(plan, data);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(run(plan, data).first_difference(first), "");
  }
}

TEST_P(Determinism, SameBitsWithAnyNumberOfThreads) {
  if (product_depends_on_threads(GetParam().engine, GetParam().types.compute)) {
    GTEST_SKIP() << "OpenBLAS's own product differs between 1 and more threads";
  }
  const Data data = make_data(GetParam().problem);
  for (const Mode& mode : kModes) {
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
  for (const Mode& mode : kModes) {
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
      return std::pair(out.de.values(), out.dc.values());
    };
    const auto first = gradients_again();
    EXPECT_EQ(gradients_again(), first);
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, Determinism, testing::ValuesIn(subjects(cases())), subject_name);

}  // namespace
}  // namespace cutloss::test
