// More than 2^31 elements of logits, of C and of dC: memory of the GPU alone.
#ifdef CUTLOSS_CUDA

#include <cmath>
#include <cstring>

#include "core/text.h"
#include "engines.h"
#include "tolerance.h"

namespace cutloss::test {
namespace {

// Memory of the GPU without a twin.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::int64_t bytes)
      : bytes_(bytes), memory_(bytes > 0 ? gpu::allocate(bytes) : nullptr) {
    if (bytes > 0) gpu::check(cudaMemset(memory_, 0xff, bytes), "poison");
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { gpu::release(memory_); }
  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_;
  void* memory_;
};

std::vector<std::string> engines_on_gpu() {
  std::vector<std::string> names = engine_names();
  std::erase_if(names, [](const std::string& name) { return !runs_on_gpu(name); });
  return names;
}

bool has_memory(std::int64_t bytes) {
  std::size_t free = 0, all = 0;
  gpu::check(cudaMemGetInfo(&free, &all), "asking for free memory");
  return static_cast<std::int64_t>(free) > bytes;
}

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

// Every logit of 17,000 rows and 131,072 columns kept at once. What backward by vocabulary makes,
// in slabs, is the measure.
TEST(GpuLarge, MoreKeptLogitsThanThirtyTwoBitsCount) {
  if (engines_on_gpu().empty() || !has_memory(24 * kGiB)) {
    GTEST_SKIP() << "needs a GPU with 24 GiB free";
  }
  Case c = with_size(1, 17000, 131072, 8);
  set_types(c.problem, kTypes[1]);  // bf16
  const Data data = make_data(c);
  for (const std::string& engine : engines_on_gpu()) {
    SCOPED_TRACE(engine);
    const Outputs want = run(plan_for(data.problem, engine, kModes[4]), data);
    for (const Upstream upstream : {Upstream::at_forward, Upstream::at_backward}) {
      Problem p = data.problem;
      set_engine(p, engine);
      p.schedule = Schedule::rows;
      p.upstream.when = upstream;
      p.max_workspace = 16 * kGiB;
      if (!takes(engine, p, kModes[0])) continue;
      const Plan plan = make_plan(p);
      SCOPED_TRACE(describe(plan));
      if (plan.chunk_rows < row_count(p)) continue;  // chunks take less, and are as quick
      Outputs out = outputs_for(p);
      const DeviceMemory kept(plan.kept_bytes);
      const DeviceMemory workspace(
          std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes));
      Args args;
      args.in = data.inputs(Device::cuda);
      args.rows = out.rows(Device::cuda);
      args.upstream = data.upstream(Device::cuda);
      args.gradients = out.gradients(Device::cuda);
      args.kept = kept.data();
      args.workspace = workspace.data();
      if (plan.keeps_logits) {
        forward(plan, args);
        backward(plan, args);
      } else {
        forward_backward(plan, args);
      }
      out.fetch();
      EXPECT_TRUE(out.guards_intact());
      for (std::int64_t n = 0; n < out.nll.count; ++n) {
        ASSERT_NEAR(out.nll.get(n), want.nll.get(n), 1e-5 * want.nll.get(n)) << "row " << n;
      }
      const auto compare = [](const char* what, const Array& got, const Array& expected) {
        double errors = 0, squares = 0;
        for (std::int64_t i = 0; i < got.count; ++i) {
          const double error = got.get(i) - expected.get(i);
          errors += error * error;
          squares += expected.get(i) * expected.get(i);
        }
        EXPECT_LE(std::sqrt(errors / squares), 0.01) << what;
      };
      compare("de", out.de, want.de);
      compare("dc", out.dc, want.dc);
    }
  }
}

// C and dC of 131,200 rows of 16,384. C is zeros but for its first and last row, so that every
// logit is 0 but two in a row, and everything is known.
TEST(GpuLarge, MoreOfCThanThirtyTwoBitsCount) {
  constexpr std::int64_t kN = 16, kV = 131200, kD = 16384;
  if (engines_on_gpu().empty() || !has_memory(24 * kGiB)) {
    GTEST_SKIP() << "needs a GPU with 24 GiB free";
  }
  Case c = with_size(1, kN, 2, kD);
  set_types(c.problem, kTypes[1]);  // bf16
  c.ignored = 0;
  Data data = make_data(c);
  classes_of(data.problem).count = kV;
  const auto logit = [&](std::int64_t n, std::int64_t row) {
    double z = 0;
    for (std::int64_t d = 0; d < kD; ++d) z += data.e.get(n * kD + d) * data.c.get(row * kD + d);
    return z;
  };
  for (std::int64_t n = 0; n < kN; ++n) data.set_target(n, n % 2 == 0 ? 0 : kV - 1);
  const DeviceMemory big_c(kV * kD * 2);
  gpu::check(cudaMemset(big_c.data(), 0, big_c.bytes()), "zeros");
  gpu::copy(big_c.data(), data.c.pointer(), kD * 2);
  gpu::copy(big_c.data() + (kV - 1) * kD * 2, data.c.buffer.data() + kD * 2, kD * 2);
  const DeviceMemory big_dc(kV * kD * 2);

  for (const std::string& engine : engines_on_gpu()) {
    for (const Mode& mode : {kModes[0], kModes[4]}) {
      Problem p = data.problem;
      set_engine(p, engine);
      if (!takes(engine, p, mode)) continue;
      p.schedule = mode.schedule;
      p.upstream.when = mode.upstream;
      const Plan plan = make_plan(p);
      SCOPED_TRACE(text(engine, "\n", describe(plan)));
      Problem small = p;
      small.wanted.dc.wanted = false;  // dC lies in big_dc
      Outputs out = outputs_for(small);
      const DeviceMemory kept(plan.kept_bytes);
      const DeviceMemory workspace(
          std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes));
      gpu::check(cudaMemset(big_dc.data(), 0xff, big_dc.bytes()), "poison");
      Args args;
      args.in = data.inputs(Device::cuda);
      args.in.c = big_c.data();
      args.rows = out.rows(Device::cuda);
      args.upstream = data.upstream(Device::cuda);
      args.gradients = out.gradients(Device::cuda);
      args.gradients.dc = big_dc.data();
      args.kept = kept.data();
      args.workspace = workspace.data();
      if (plan.schedule == Schedule::rows) {
        forward_backward(plan, args);
      } else {
        forward(plan, args);
        backward(plan, args);
      }
      out.fetch();
      std::vector<double> sum(kN), first(kN), last(kN);
      for (std::int64_t n = 0; n < kN; ++n) {
        first[n] = logit(n, 0);
        last[n] = logit(n, 1);
        sum[n] = static_cast<double>(kV - 2) + std::exp(first[n]) + std::exp(last[n]);
        const double want = std::log(sum[n]) - (n % 2 == 0 ? first[n] : last[n]);
        EXPECT_NEAR(out.nll.get(n), want, 1e-4 * want) << "row " << n;
      }
      for (const std::int64_t v : {std::int64_t{0}, std::int64_t{1}, kV / 2, kV - 2, kV - 1}) {
        Array dc(DType::bf16, kD);
        gpu::copy(dc.pointer(), big_dc.data() + v * kD * 2, kD * 2);
        double errors = 0, squares = 0;
        for (std::int64_t d = 0; d < kD; ++d) {
          double want = 0;
          for (std::int64_t n = 0; n < kN; ++n) {
            const double z = v == 0 ? first[n] : v == kV - 1 ? last[n] : 0;
            const bool target = v == (n % 2 == 0 ? 0 : kV - 1);
            want += data.d_nll.get(n) * (std::exp(z) / sum[n] - (target ? 1 : 0)) *
                    data.e.get(n * kD + d);
          }
          errors += (dc.get(d) - want) * (dc.get(d) - want);
          squares += want * want;
        }
        EXPECT_LE(std::sqrt(errors / squares), 0.01) << "row " << v << " of dC";
      }
    }
  }
}

}  // namespace
}  // namespace cutloss::test

#endif  // CUTLOSS_CUDA
