// A loss of your own, at the price of the cross-entropy: the clipped objective of PPO and GRPO,
//
//   loss = -1/N sum_n min(r A, clip(r, 1 - 0.2, 1 + 0.2) A),   r = p_n / p_old_n = exp(old - nll)
//
// (Schulman et al. 2017, "Proximal Policy Optimization Algorithms"). What backward has to know of a
// token, d loss / d nll, is a function of the token's own nll. So it can be said chunk by chunk,
// between a chunk's statistics and its gradients, while the chunk's logits are still there: three
// matrix products instead of four. Anything that couples tokens (DPO's sums over a sequence) goes
// by forward, then backward with Upstream::at_backward, as the check at the end does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cutloss/cutloss.h"

namespace {

constexpr std::int64_t V = 1500, D = 48, N = 400;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Bytes = std::unique_ptr<void, Free>;

Bytes allocate(std::int64_t bytes) {
  const auto rounded = static_cast<std::size_t>((bytes + 63) / 64 * 64);
  return Bytes(std::aligned_alloc(64, rounded > 0 ? rounded : 64));
}

std::vector<float> random_numbers(std::int64_t size, unsigned seed, float deviation) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> numbers(static_cast<std::size_t>(size));
  for (float& x : numbers) x = normal(generator);
  return numbers;
}

// What one token adds to the loss, and its derivative by nll: dr/dnll = -r.
struct Token {
  float loss, d_nll;
};
Token clipped(float nll, float old_nll, float advantage) {
  const float ratio = std::exp(old_nll - nll);
  const float bounded = std::clamp(ratio, 0.8f, 1.2f);
  const bool follows = ratio * advantage <= bounded * advantage;
  return {-std::min(ratio * advantage, bounded * advantage) / N,
          follows ? ratio * advantage / N : 0.0f};
}

// Everything a call points to. Tokens with target -100 count nowhere.
struct Batch {
  std::vector<float> e = random_numbers(N * D, 1, 0.4f), c = random_numbers(V * D, 2, 0.4f);
  std::vector<float> advantage = random_numbers(N, 3, 1.0f);
  std::vector<float> old_nll = std::vector<float>(N);
  std::vector<std::int64_t> targets = std::vector<std::int64_t>(N);
  std::vector<float> nll = old_nll, row_max = old_nll, log_sum = old_nll, d_nll = old_nll;
  std::vector<float> de = std::vector<float>(N * D), dc = std::vector<float>(V * D);
};

cutloss::Problem problem_for(cutloss::Upstream upstream) {
  cutloss::Problem problem;
  problem.rows.length = N;
  cutloss::Head& head = head_of(problem);
  head.classes.count = V;
  head.D = D;
  problem.wanted.de.wanted = problem.wanted.dc.wanted = true;
  problem.upstream.when = upstream;
  return problem;
}

cutloss::Args args_for(Batch& b, const Bytes& kept, const Bytes& workspace) {
  cutloss::Args args;
  args.in.e = b.e.data();
  args.in.c = b.c.data();
  args.in.targets = b.targets.data();
  args.rows.nll = b.nll.data();
  args.rows.row_max = b.row_max.data();
  args.rows.log_sum = b.log_sum.data();
  args.upstream.d_nll = b.d_nll.data();
  args.gradients.de = b.de.data();
  args.gradients.dc = b.dc.data();
  args.kept = kept.get();
  args.workspace = workspace.get();
  return args;
}

// Chunk by chunk, with the coefficients written in between.
float loss_in_the_seam(Batch& b) {
  cutloss::Problem problem = problem_for(cutloss::Upstream::at_forward);
  problem.schedule = cutloss::Schedule::rows;
  problem.max_workspace = std::int64_t{3} << 20;  // bytes: here it takes several chunks
  const cutloss::Plan plan = cutloss::make_plan(problem);
  const Bytes kept = allocate(plan.kept_bytes);
  const Bytes workspace = allocate(plan.forward_workspace_bytes);
  const cutloss::Args args = args_for(b, kept, workspace);

  float loss = 0;
  const auto session = cutloss::open(plan, args, cutloss::Pass::both);
  session->begin();
  for (std::int64_t chunk = 0; chunk < cutloss::chunk_count(plan); ++chunk) {
    session->statistics(chunk);
    const cutloss::RowList list = session->rows(chunk);
    for (std::int64_t i = 0; i < list.count; ++i) {
      const std::int64_t n = list.rows[i];
      const Token token = clipped(b.nll[n], b.old_nll[n], b.advantage[n]);
      b.d_nll[n] = token.d_nll;
      loss += token.loss;
    }
    session->gradients(chunk);
  }
  session->finish();
  return loss;
}

// The same in two calls, with the coefficients of all tokens in between.
float loss_in_two_calls(Batch& b) {
  const cutloss::Plan plan = cutloss::make_plan(problem_for(cutloss::Upstream::at_backward));
  const Bytes kept = allocate(plan.kept_bytes);
  const Bytes workspace =
      allocate(std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes));
  const cutloss::Args args = args_for(b, kept, workspace);

  cutloss::forward(plan, args);
  float loss = 0;
  for (std::int64_t n = 0; n < N; ++n) {
    if (b.targets[n] == -100) continue;
    const Token token = clipped(b.nll[n], b.old_nll[n], b.advantage[n]);
    b.d_nll[n] = token.d_nll;
    loss += token.loss;
  }
  cutloss::backward(plan, args);
  return loss;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double apart = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    apart += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(apart / size);
}

}  // namespace

int main() try {
  Batch batch;
  for (std::int64_t n = 0; n < N; ++n) batch.targets[n] = n % 10 == 0 ? -100 : (7 * n + 3) % V;
  loss_in_two_calls(batch);
  batch.old_nll = batch.nll;  // the policy as it was

  float first = 0, last = 0;
  for (int step = 0; step <= 20; ++step) {
    last = loss_in_the_seam(batch);
    if (step == 0) first = last;
    if (step % 10 == 0) {
      Batch other = batch;
      const float same = loss_in_two_calls(other);
      const double de = difference(batch.de, other.de), dc = difference(batch.dc, other.dc);
      std::printf("step %2d  loss %+.5f, in two calls %+.5f; dE and dC differ by %.0e and %.0e\n",
                  step, last, same, de, dc);
      if (!(std::abs(last - same) < 1e-5f && de < 1e-5 && dc < 1e-5)) return 1;
    }
    for (std::size_t i = 0; i < batch.e.size(); ++i) batch.e[i] -= 20.0f * batch.de[i];
    for (std::size_t i = 0; i < batch.c.size(); ++i) batch.c[i] -= 20.0f * batch.dc[i];
  }
  return last < first - 0.05f ? 0 : 1;
} catch (const cutloss::Error& error) {
  std::fprintf(stderr, "cutloss: %s\n", error.what());
  return 1;
}
