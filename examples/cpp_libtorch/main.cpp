// A training loop in libtorch whose loss never stores the logits: a torch::autograd::Function over
// cutloss, and every few steps the same loss and gradients by torch::cross_entropy_loss. Build and
// run:
//
//   cmake -S . -B build -DCMAKE_BUILD_TYPE=Release
//     "-DCMAKE_PREFIX_PATH=<where cutloss was installed>;<libtorch, or what
//      python -c 'import torch; print(torch.utils.cmake_prefix_path)' prints>"
//   cmake --build build && build/train
//
// It trains on the CPU and, where libtorch finds one, on a GPU, in fp32 and in bf16.
#include <torch/torch.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <cstdio>
#include <vector>

#include "cutloss/cutloss.h"

using torch::Tensor;

namespace {

cutloss::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::kFloat:
      return cutloss::DType::f32;
    case torch::kDouble:
      return cutloss::DType::f64;
    case torch::kBFloat16:
      return cutloss::DType::bf16;
    // The gradients below are made before a loss scale is known, and fp16 would lose small ones:
    // for fp16 take Upstream::at_backward.
    default:
      TORCH_CHECK_TYPE(false, "need float, double or bfloat16, got ", tensor.dtype());
  }
}

// The stream on which libtorch works now: null for the CPU.
void* current_stream(torch::Device device) {
#ifdef WITH_CUDA
  if (device.is_cuda()) return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#endif
  TORCH_CHECK(device.is_cpu(), "tensors are on ", device, ", and this program has the CPU alone");
  return nullptr;
}

struct Result {
  Tensor loss, de, dc;
};

// The mean of cross_entropy(e cᵀ, targets) over the targets that are not ignore_index, and the
// gradients that are wanted. Nothing waits for a GPU.
Result loss_and_gradients(Tensor e, Tensor c, Tensor targets, bool needs_de, bool needs_dc) {
  TORCH_CHECK_VALUE(c.dim() == 2 && e.dim() >= 1 && e.size(-1) == c.size(1),
                    "e must be (..., D) and c (V, D), got ", e.sizes(), " and ", c.sizes());
  TORCH_CHECK_VALUE(targets.sizes() == e.sizes().slice(0, e.dim() - 1),
                    "targets must be (...) of e, got ", targets.sizes(), " and ", e.sizes());
  TORCH_CHECK_TYPE(targets.scalar_type() == torch::kLong, "targets must be int64, got ",
                   targets.dtype());
  TORCH_CHECK_VALUE(c.device() == e.device() && targets.device() == e.device(),
                    "e, c and targets must be on one device, got ", e.device(), ", ", c.device(),
                    " and ", targets.device());
  e = e.contiguous();
  c = c.contiguous();
  targets = targets.contiguous();
  const c10::DeviceGuard guard(e.device());

  cutloss::Problem problem;
  problem.rows.length = targets.numel();
  cutloss::Head& head = head_of(problem);
  head.classes.count = c.size(0);
  head.D = c.size(1);
  head.e_type = problem.compute_type = dtype_of(e);
  head.c_type = dtype_of(c);
  problem.wanted.de.wanted = needs_de;
  problem.wanted.dc.wanted = needs_dc;
  const bool training = needs_de || needs_dc;
  problem.upstream.when = training ? cutloss::Upstream::at_forward : cutloss::Upstream::none;
  problem.device = e.is_cuda() ? cutloss::Device::cuda : cutloss::Device::cpu;
  const cutloss::Plan plan = cutloss::make_plan(problem);

  // Memory is libtorch's. Its allocators align to 64 bytes and follow the stream, so what is freed
  // at the end of this function is not reused before the work on it is done.
  const auto stats = e.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const Tensor nll = torch::empty({problem.rows.length}, e.options().dtype(stats));
  const Tensor row_max = torch::empty_like(nll), log_sum = torch::empty_like(nll);
  const Tensor d_nll = torch::empty_like(nll);
  const Tensor undefined = torch::empty({}, e.options().dtype(torch::kBool));
  const auto bytes = e.options().dtype(torch::kByte);
  const Tensor kept = torch::empty({plan.kept_bytes}, bytes);
  const Tensor workspace =
      torch::empty({std::max(plan.forward_workspace_bytes, plan.backward_workspace_bytes)}, bytes);
  Result result{torch::empty({}, nll.options()), needs_de ? torch::empty_like(e) : Tensor(),
                needs_dc ? torch::empty_like(c) : Tensor()};

  cutloss::Args args;
  args.stream = current_stream(e.device());
  args.in.e = e.const_data_ptr();
  args.in.c = c.const_data_ptr();
  args.in.targets = targets.const_data_ptr();
  args.rows.nll = nll.mutable_data_ptr();
  args.rows.row_max = row_max.mutable_data_ptr();
  args.rows.log_sum = log_sum.mutable_data_ptr();
  args.upstream.d_nll = d_nll.const_data_ptr();
  if (needs_de) args.gradients.de = result.de.mutable_data_ptr();
  if (needs_dc) args.gradients.dc = result.dc.mutable_data_ptr();
  args.kept = kept.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();

  // 1 / count for rows that count, 0 for ignored ones; label smoothing, class and token weights and
  // z-loss would come in here.
  cutloss::LossTerms terms;
  terms.nll = d_nll.mutable_data_ptr();
  terms.undefined = undefined.mutable_data_ptr<bool>();
  cutloss::loss_terms(loss_rows(problem), {.mean = true}, args.in.targets, terms, args.stream);

  if (plan.schedule == cutloss::Schedule::rows && !plan.keeps_logits) {
    cutloss::forward_backward(plan, args);
  } else {
    cutloss::forward(plan, args);
    if (training) cutloss::backward(plan, args);
  }
  cutloss::weighted_loss(plan, args, result.loss.mutable_data_ptr(), terms.undefined);
  return result;
}

class Function : public torch::autograd::Function<Function> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& e, const Tensor& c,
                        const Tensor& targets, bool needs_de, bool needs_dc) {
    const Result result = loss_and_gradients(e, c, targets, needs_de, needs_dc);
    context->saved_data["de"] = result.de;
    context->saved_data["dc"] = result.dc;
    return result.loss;
  }

  // The gradients are there already, for a loss that counts once. They are handed out as they are,
  // without a second copy of C's, and therefore once.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    TORCH_CHECK(!torch::GradMode::is_enabled(), "there are no second derivatives (create_graph)");
    TORCH_CHECK(!context->saved_data.empty(), "backward was called twice (retain_graph)");
    Tensor de = context->saved_data["de"].toTensor(), dc = context->saved_data["dc"].toTensor();
    context->saved_data.clear();
    for (Tensor* gradient : {&de, &dc}) {
      if (gradient->defined()) gradient->mul_(upstream[0]);
    }
    return {de, dc, Tensor(), Tensor(), Tensor()};
  }
};

// What a training loop calls. Without gradients, as under torch::NoGradGuard, the loss alone is
// computed.
Tensor linear_cross_entropy(const Tensor& e, const Tensor& c, const Tensor& targets) {
  const bool training = torch::GradMode::is_enabled();
  return Function::apply(e, c, targets, training && e.requires_grad(),
                         training && c.requires_grad());
}

// --- the training loop ------------------------------------------------------------------------

constexpr std::int64_t V = 2003, D = 64, N = 512;

struct Model : torch::nn::Module {
  Model() {
    embedding = register_module("embedding", torch::nn::Embedding(V, D));
    hidden = register_module("hidden", torch::nn::Linear(D, D));
    classifier = register_parameter("classifier", 0.1 * torch::randn({V, D}));
  }
  Tensor forward(const Tensor& tokens) {
    const Tensor e = embedding(tokens);
    return e + torch::gelu(hidden(e));
  }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear hidden{nullptr};
  Tensor classifier;
};

// The largest difference of two lists of gradients, relative to the norm of each.
double difference(const std::vector<Tensor>& ours, const std::vector<Tensor>& theirs) {
  double largest = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const Tensor a = ours[i].to(torch::kDouble), b = theirs[i].to(torch::kDouble);
    largest = std::max(largest, ((a - b).norm() / b.norm()).item<double>());
  }
  return largest;
}

bool train(torch::Device device, torch::ScalarType dtype) {
  torch::manual_seed(0);
  Model model;
  model.to(device, dtype);
  torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(1e-2));
  const double allowed = dtype == torch::kFloat ? 1e-4 : 3e-2;
  std::printf("on %s, %s\n", device.str().c_str(), torch::toString(dtype));

  double first = 0, last = 0;
  for (int step = 0; step <= 60; ++step) {
    const Tensor tokens = torch::randint(V, {N}, torch::device(device).dtype(torch::kLong));
    Tensor targets = (3 * tokens + 1) % V;  // the token that follows
    targets = targets.masked_fill(torch::rand({N}, device) < 0.1, -100);

    optimizer.zero_grad();
    const Tensor loss = linear_cross_entropy(model.forward(tokens), model.classifier, targets);
    loss.backward();

    if (step % 20 == 0) {
      std::vector<Tensor> gradients;
      for (const Tensor& parameter : model.parameters()) gradients.push_back(parameter.grad());
      const Tensor logits = model.forward(tokens).matmul(model.classifier.t()).to(torch::kFloat);
      const Tensor plain = torch::cross_entropy_loss(logits, targets);
      const double off = difference(gradients, torch::autograd::grad({plain}, model.parameters()));
      last = loss.item<double>();
      if (step == 0) first = last;
      std::printf("step %2d  loss %.5f  with logits stored %.5f  gradients differ by %.1e\n", step,
                  last, plain.item<double>(), off);
      const bool same_loss = std::abs(last - plain.item<double>()) <= allowed * (1 + last);
      if (!same_loss || !(off <= allowed)) return false;
    }
    optimizer.step();
  }
  return last < first / 2;
}

}  // namespace

int main() try {
  std::vector<torch::Device> devices{torch::kCPU};
#ifdef WITH_CUDA
  if (torch::cuda::is_available()) devices.emplace_back(torch::kCUDA, 0);
#endif
  for (const torch::Device device : devices) {
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      if (!train(device, dtype)) {
        std::fprintf(stderr, "the two losses differ, or nothing was learnt\n");
        return 1;
      }
    }
  }
  return 0;
} catch (const std::exception& error) {  // cutloss::Error and c10::Error are both of these
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
