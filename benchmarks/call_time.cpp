// How long calls take on the host where everything is warm, in microseconds: planning, opening a
// session, and a whole call on the CPU at (4, 16, 50); the median and the least of many.
//
//     c++ -std=c++20 -O2 benchmarks/call_time.cpp -Iinclude -L<built> -lcutloss -o call_time
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "cutloss/cutloss.h"

namespace {

void report(const char* what, const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int i = 0; i < 4000; ++i) {
    const auto begin = Clock::now();
    call();
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  std::sort(times.begin() + 1000, times.end());
  std::printf("%-28s median %8.2f  least %8.2f\n", what, times[2500], times[1000]);
}

cutloss::Problem problem_of(std::int64_t rows, std::int64_t D, std::int64_t V) {
  cutloss::Problem p;
  p.rows.length = rows;
  head_of(p).D = D;
  head_of(p).classes.count = V;
  p.wanted.de.wanted = p.wanted.dc.wanted = true;
  p.upstream.when = cutloss::Upstream::at_forward;
  return p;
}

}  // namespace

int main() {
  const std::int64_t N = 4, D = 16, V = 50;
  const cutloss::Problem problem = problem_of(N, D, V);
  const cutloss::Plan plan = make_plan(problem);
  std::vector<float> e(N * D, 0.5f), c(V * D, 0.25f), de(N * D), dc(V * D);
  std::vector<std::int64_t> targets = {3, 1, 4, 1};
  std::vector<float> nll(N), row_max(N), log_sum(N), d_nll(N, 0.25f);
  const auto memory = [](std::int64_t bytes) {
    return ::operator new (static_cast<std::size_t>(bytes) + 64, std::align_val_t{64});
  };
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
  args.kept = memory(plan.kept_bytes);
  args.workspace = memory(std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes));

  report("make_plan (4,16,50)", [&] { make_plan(problem); });
  cutloss::Problem large = problem_of(8192, 4096, 131072);
  report("make_plan (8192,4096,131072)", [&] { make_plan(large); });
  large.schedule = cutloss::Schedule::vocabulary;
  large.max_workspace = std::int64_t{64} << 20;
  report("the same in 64 MiB", [&] { make_plan(large); });
  report("open", [&] { open(plan, args, cutloss::Pass::both); });
  report("forward_backward (4,16,50)", [&] { forward_backward(plan, args); });
}
