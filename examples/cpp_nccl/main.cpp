// The loss of a classifier whose classes lie in shards on all GPUs of this machine, and its
// gradients, with NCCL between them. Build and run:
//
//   cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=<where cutloss was
//   installed> -DNCCL_ROOT=<where NCCL was> && cmake --build build && build/sharded
//
// Each GPU has all rows of E and its own rows of C. forward leaves the rows open; an all-gather
// brings the states of all shards to each GPU, where close_rows makes the same nll of them, bit by
// bit; backward makes dC of the shard, and its part of dE, which an all-reduce adds up.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cutloss/cutloss.h"

namespace {

constexpr std::int64_t N = 512, D = 256, V = 5003;  // no number of GPUs divides V

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
void check(ncclResult_t error) {
  if (error != ncclSuccess) throw std::runtime_error(ncclGetErrorString(error));
}

// Memory of the current GPU; small programs leave it to the end of the process.
void* device_bytes(std::int64_t bytes, const void* from = nullptr) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes > 0 ? bytes : 1));
  if (from != nullptr) check(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
  return memory;
}

struct Data {
  std::vector<float> e = std::vector<float>(N * D), c = std::vector<float>(V * D);
  std::vector<std::int64_t> targets = std::vector<std::int64_t>(N);
  std::vector<float> d_nll = std::vector<float>(N, 1.0f / N);  // of the mean
};

struct Result {
  std::vector<float> nll = std::vector<float>(N), de = std::vector<float>(N * D), dc;
};

Result of_shard(const Data& data, int rank, int ranks, ncclComm_t comm) {
  check(cudaSetDevice(rank));
  cutloss::Problem p;
  p.device = cutloss::Device::cuda;
  p.rows.length = N;
  cutloss::Head& head = cutloss::head_of(p);
  head.D = D;
  const std::int64_t first = V * rank / ranks, end = V * (rank + 1) / ranks;
  head.classes = {first, end - first, V};
  p.wanted.state = true;
  p.wanted.de.wanted = p.wanted.dc.wanted = true;
  p.upstream.when = cutloss::Upstream::at_backward;
  const cutloss::Plan plan = cutloss::make_plan(p);

  const std::int64_t state_bytes = N * cutloss::row_state_bytes(cutloss::DType::f32);
  auto* states = static_cast<std::byte*>(device_bytes(ranks * state_bytes));
  cutloss::Args args;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  args.stream = stream;
  args.in.e = device_bytes(N * D * 4, data.e.data());
  args.in.c = device_bytes((end - first) * D * 4, data.c.data() + first * D);
  args.in.targets = device_bytes(N * 8, data.targets.data());
  args.rows.state = states + rank * state_bytes;
  args.rows.nll = device_bytes(N * 4);
  args.rows.row_max = device_bytes(N * 4);
  args.rows.log_sum = device_bytes(N * 4);
  args.upstream.d_nll = device_bytes(N * 4, data.d_nll.data());
  args.gradients = {device_bytes(N * D * 4), device_bytes((end - first) * D * 4), nullptr};
  args.kept = device_bytes(plan.kept_bytes);

  args.workspace = device_bytes(plan.forward_workspace_bytes);
  cutloss::forward(plan, args);
  check(ncclAllGather(args.rows.state, states, state_bytes, ncclInt8, comm, stream));
  cutloss::RowStates all;
  all.states = states;
  all.count = ranks;
  all.targets = args.in.targets;
  cutloss::close_rows(cutloss::loss_rows(p), all, args.rows, stream);

  args.workspace = device_bytes(plan.backward_workspace_bytes);
  cutloss::backward(plan, args);
  check(
      ncclAllReduce(args.gradients.de, args.gradients.de, N * D, ncclFloat, ncclSum, comm, stream));
  check(cudaStreamSynchronize(stream));

  Result out;
  out.dc.resize((end - first) * D);
  const auto fetch = [](std::vector<float>& to, const void* from) {
    check(cudaMemcpy(to.data(), from, to.size() * 4, cudaMemcpyDeviceToHost));
  };
  fetch(out.nll, args.rows.nll);
  fetch(out.de, args.gradients.de);
  fetch(out.dc, args.gradients.dc);
  return out;
}

// All shards at once: a thread for each GPU.
std::vector<Result> on_gpus(const Data& data, int ranks) {
  std::vector<ncclComm_t> comms(ranks);
  check(ncclCommInitAll(comms.data(), ranks, nullptr));
  std::vector<Result> results(ranks);
  std::vector<std::string> errors(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        results[rank] = of_shard(data, rank, ranks, comms[rank]);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
        for (ncclComm_t comm : comms) ncclCommAbort(comm);  // the others wait for this one
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
  return results;
}

double distance(const std::vector<float>& a, const float* b) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    size += double{a[i]} * a[i];
  }
  return std::sqrt(difference / size);
}

int run() {
  Data data;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& x : data.e) x = normal(random);
  for (float& x : data.c) x = normal(random) / 8;
  for (std::int64_t& t : data.targets) t = static_cast<std::int64_t>(random() % V);

  int gpus = 0;
  check(cudaGetDeviceCount(&gpus));
  const Result whole = on_gpus(data, 1)[0];
  const std::vector<Result> shards = on_gpus(data, gpus);
  double worst = 0;
  for (int rank = 0; rank < gpus; ++rank) {
    const Result& own = shards[rank];
    if (own.nll != shards[0].nll) throw std::runtime_error("the ranks' losses differ");
    worst = std::max({worst, distance(own.nll, whole.nll.data()), distance(own.de, whole.de.data()),
                      distance(own.dc, whole.dc.data() + V * rank / gpus * D)});
  }
  double loss = 0;
  for (const float nll : shards[0].nll) loss += nll / N;
  std::printf("%d GPUs: loss %.6f, the same bits on all; at most %.1e from that of one GPU\n", gpus,
              loss, worst);
  return worst < 1e-5 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
