// Learns a successor table by gradient descent with cutloss alone: token t is followed by
// (3t + 1) mod V. Build and run:
//
//   cmake -S . -B build -DCMAKE_PREFIX_PATH=<where cutloss was installed>
//   cmake --build build && build/successor
//
// E holds one embedding for each token and C one classifier row, so N = V. Each step asks for the
// mean loss and the gradients of E and C. token_loss.cpp has a loss of your own.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cutloss/cutloss.h"

namespace {

// Workspace is the caller's: any memory that is 64-byte aligned.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Bytes = std::unique_ptr<void, Free>;

Bytes allocate(std::int64_t bytes) {
  const auto rounded = static_cast<std::size_t>((bytes + 63) / 64 * 64);
  return Bytes(std::aligned_alloc(64, rounded > 0 ? rounded : 64));
}

std::vector<float> random_matrix(std::int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> matrix(static_cast<std::size_t>(size));
  for (float& x : matrix) x = normal(generator);
  return matrix;
}

void descend(std::vector<float>& parameter, const std::vector<float>& gradient, float rate) {
  for (std::size_t i = 0; i < parameter.size(); ++i) parameter[i] -= rate * gradient[i];
}

}  // namespace

int main() try {
  constexpr std::int64_t V = 1000, D = 32, N = V;

  // 1. Plain facts. The gradients' upstream coefficients (1/N each, for the mean) are known when
  //    the loss is asked for, so one call may give both.
  cutloss::Problem problem;
  problem.rows.length = N;
  cutloss::Head& head = head_of(problem);
  head.classes.count = V;
  head.D = D;
  problem.wanted.de.wanted = problem.wanted.dc.wanted = true;
  problem.upstream.when = cutloss::Upstream::at_forward;

  // 2. The plan says how it will be done, and how much memory that takes. By rows the gradients are
  //    made along with the loss, by vocabulary (where memory is short) after it.
  const cutloss::Plan plan = cutloss::make_plan(problem);
  std::printf("%s\n", cutloss::describe(plan).c_str());
  const Bytes kept = allocate(plan.kept_bytes);
  const Bytes workspace =
      allocate(std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes));
  const bool at_once = plan.schedule == cutloss::Schedule::rows && !plan.keeps_logits;

  std::vector<float> e = random_matrix(N * D, 1), c = random_matrix(V * D, 2);
  std::vector<float> de(e.size()), dc(c.size());
  std::vector<std::int64_t> targets(N);
  for (std::int64_t n = 0; n < N; ++n) targets[n] = (3 * n + 1) % V;
  std::vector<float> nll(N), row_max(N), log_sum(N);
  const std::vector<float> d_nll(N, 1.0f / N);

  // 3. Pointers.
  cutloss::Args args;
  args.in.e = e.data();
  args.in.c = c.data();
  args.in.targets = targets.data();
  args.rows.nll = nll.data();
  args.rows.row_max = row_max.data();
  args.rows.log_sum = log_sum.data();
  args.upstream.d_nll = d_nll.data();
  args.gradients.de = de.data();
  args.gradients.dc = dc.data();
  args.kept = kept.get();
  args.workspace = workspace.get();

  // 4. Steps.
  double first = 0, mean = 0;
  for (int step = 0; step <= 60; ++step) {
    if (at_once) {
      cutloss::forward_backward(plan, args);
    } else {
      cutloss::forward(plan, args);
      cutloss::backward(plan, args);
    }
    mean = 0;
    for (const float x : nll) mean += x / N;
    if (step == 0) first = mean;
    if (step % 20 == 0) std::printf("step %2d  loss %.4f\n", step, mean);
    descend(e, de, 200.0f);
    descend(c, dc, 200.0f);
  }
  std::printf("a guess would have %.4f\n", std::log(static_cast<double>(V)));
  return mean < first / 10 ? 0 : 1;
} catch (const cutloss::Error& error) {
  std::fprintf(stderr, "cutloss: %s\n", error.what());
  return 1;
}
