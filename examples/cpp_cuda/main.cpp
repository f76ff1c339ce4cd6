// Trains on a GPU with cutloss and raw device pointers, on a stream of its own. Build and run:
//
//   cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=<where cutloss was
//   installed> cmake --build build && build/train
//
// The task is that of cpp_cpu: token t is followed by (3t + 1) mod V, E holds one embedding for
// each token and C one classifier row, both in fp32. The first step's loss and gradients are
// compared with loops in fp64 on the host; then each step is three calls on the stream, and the
// host waits only where it prints. It is done with products in fp32 and in bf16, and by either
// schedule.
//
// cutloss opens libcublasLt.so when it makes a plan: put its directory into LD_LIBRARY_PATH where
// the loader does not know it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cutloss/cutloss.h"
#include "descend.h"

namespace {

constexpr std::int64_t V = 1000, D = 64, N = V;
constexpr std::int64_t kIgnored = -100;

// --- the GPU's memory and streams -------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "waiting for the stream"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// cudaMalloc aligns to 256 bytes; cutloss asks for 64.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(std::int64_t count) : count_(count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::int64_t>(count, 1) * sizeof(T)), "cudaMalloc");
    data_ = static_cast<T*>(memory);
  }
  OnDevice(const std::vector<T>& values, const Stream& stream)
      : OnDevice(static_cast<std::int64_t>(values.size())) {
    copy(data_, values.data(), stream);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }

  T* get() const { return data_; }
  std::int64_t count() const { return count_; }
  std::vector<T> fetch(const Stream& stream) const {
    std::vector<T> values(count_);
    copy(values.data(), data_, stream);
    stream.wait();
    return values;
  }

 private:
  void copy(T* to, const T* from, const Stream& stream) const {
    check(cudaMemcpyAsync(to, from, count_ * sizeof(T), cudaMemcpyDefault, stream.get()), "a copy");
  }

  T* data_ = nullptr;
  std::int64_t count_ = 0;
};

// --- the same on the host, in fp64, with the logits stored ------------------------------------

struct Truth {
  double loss = 0;
  std::vector<double> de = std::vector<double>(N * D), dc = std::vector<double>(V * D);
};

Truth on_host(const std::vector<float>& e, const std::vector<float>& c,
              const std::vector<std::int64_t>& targets) {
  Truth truth;
  const auto ignored = std::count(targets.begin(), targets.end(), kIgnored);
  const double weight = 1.0 / static_cast<double>(N - ignored);
  std::vector<double> z(V);
  for (std::int64_t n = 0; n < N; ++n) {
    if (targets[n] == kIgnored) continue;
    for (std::int64_t v = 0; v < V; ++v) {
      z[v] = 0;
      for (std::int64_t d = 0; d < D; ++d) z[v] += double{e[n * D + d]} * c[v * D + d];
    }
    const double most = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (const double x : z) sum += std::exp(x - most);
    const double lse = most + std::log(sum);
    truth.loss += weight * (lse - z[targets[n]]);
    for (std::int64_t v = 0; v < V; ++v) {
      const double g = weight * (std::exp(z[v] - lse) - (v == targets[n] ? 1 : 0));
      for (std::int64_t d = 0; d < D; ++d) {
        truth.de[n * D + d] += g * c[v * D + d];
        truth.dc[v * D + d] += g * e[n * D + d];
      }
    }
  }
  return truth;
}

// The distance of two gradients, relative to their length.
double difference(const std::vector<float>& ours, const std::vector<double>& truth) {
  double apart = 0, size = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    apart += (ours[i] - truth[i]) * (ours[i] - truth[i]);
    size += truth[i] * truth[i];
  }
  return std::sqrt(apart / size);
}

// --- training ---------------------------------------------------------------------------------

std::vector<float> random_matrix(std::int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> matrix(static_cast<std::size_t>(size));
  for (float& x : matrix) x = normal(generator);
  return matrix;
}

bool train(cutloss::DType compute_type, cutloss::Schedule schedule) {
  // 1. Plain facts.
  cutloss::Problem problem;
  problem.rows.length = N;
  cutloss::Head& head = head_of(problem);
  head.classes.count = V;
  head.D = D;
  problem.compute_type = compute_type;  // of the products; E, C and their gradients are fp32
  problem.rows.ignore_index = kIgnored;
  problem.wanted.de.wanted = problem.wanted.dc.wanted = true;
  problem.upstream.when = cutloss::Upstream::at_forward;
  problem.schedule = schedule;  // leave it out, and the plan takes what is quicker and fits
  problem.device = cutloss::Device::cuda;

  // 2. The plan is for the current device, says how much memory it takes, and is made once.
  const cutloss::Plan plan = cutloss::make_plan(problem);
  std::printf("%s\n", cutloss::describe(plan).c_str());
  const OnDevice<std::byte> kept(plan.kept_bytes);
  const OnDevice<std::byte> workspace(
      std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes));

  const Stream stream;
  const std::vector<float> e_start = random_matrix(N * D, 1), c_start = random_matrix(V * D, 2);
  std::vector<std::int64_t> next(N);
  for (std::int64_t n = 0; n < N; ++n) next[n] = n % 10 == 0 ? kIgnored : (3 * n + 1) % V;
  const OnDevice<float> e(e_start, stream), c(c_start, stream), de(N * D), dc(V * D);
  const OnDevice<std::int64_t> targets(next, stream);
  const OnDevice<float> nll(N), row_max(N), log_sum(N), d_nll(N), loss(1);
  const OnDevice<bool> undefined(1);

  // 3. Pointers, all of them to the device's memory, and the stream.
  cutloss::Args args;
  args.stream = stream.get();
  args.in.e = e.get();
  args.in.c = c.get();
  args.in.targets = targets.get();
  args.rows.nll = nll.get();
  args.rows.row_max = row_max.get();
  args.rows.log_sum = log_sum.get();
  args.upstream.d_nll = d_nll.get();
  args.gradients.de = de.get();
  args.gradients.dc = dc.get();
  args.kept = kept.get();
  args.workspace = workspace.get();

  // 4. What each token's loss counts: one over the number of those that are not ignored, which only
  //    the device knows. Once for these targets; a trainer does it for each batch.
  cutloss::LossTerms terms;
  terms.nll = d_nll.get();
  terms.undefined = undefined.get();
  cutloss::loss_terms(loss_rows(problem), {.mean = true}, targets.get(), terms, stream.get());

  // 5. Steps. By rows the gradients are made along with the loss, by vocabulary after it.
  const bool at_once = plan.schedule == cutloss::Schedule::rows && !plan.keeps_logits;
  float first = 0, last = 0;
  for (int step = 0; step <= 60; ++step) {
    if (at_once) {
      cutloss::forward_backward(plan, args);
    } else {
      cutloss::forward(plan, args);
      cutloss::backward(plan, args);
    }
    cutloss::weighted_loss(plan, args, loss.get(), undefined.get());
    if (step == 0) {
      first = loss.fetch(stream)[0];
      const Truth truth = on_host(e_start, c_start, next);
      const double off_e = difference(de.fetch(stream), truth.de);
      const double off_c = difference(dc.fetch(stream), truth.dc);
      std::printf("loss %.6f, on the host %.6f; dE and dC are off by %.0e and %.0e\n", first,
                  truth.loss, off_e, off_c);
      const double allowed = compute_type == cutloss::DType::f32 ? 1e-5 : 1e-2;
      const bool close = std::abs(first - truth.loss) <= allowed * truth.loss;
      if (!(close && off_e <= allowed && off_c <= allowed)) return false;
    }
    check(descend(e.get(), de.get(), e.count(), 200.0f, stream.get()), "descend");
    check(descend(c.get(), dc.get(), c.count(), 200.0f, stream.get()), "descend");
    if (step % 20 == 0) {
      last = loss.fetch(stream)[0];
      std::printf("step %2d  loss %.4f\n", step, last);
    }
  }
  return last < first / 10;
}

}  // namespace

int main() try {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0) {
    std::printf("not run: no GPU (%s)\n", cudaGetErrorString(found));
    return 1;
  }
  for (const auto compute_type : {cutloss::DType::f32, cutloss::DType::bf16}) {
    for (const auto schedule : {cutloss::Schedule::rows, cutloss::Schedule::vocabulary}) {
      if (!train(compute_type, schedule)) {
        std::fprintf(stderr, "the numbers differ from the host's, or nothing was learnt\n");
        return 1;
      }
    }
  }
  return 0;
} catch (const cutloss::Error& error) {
  std::fprintf(stderr, "cutloss: %s\n", error.what());
  return 1;
} catch (const std::runtime_error& error) {
  std::fprintf(stderr, "CUDA: %s\n", error.what());
  return 1;
}
