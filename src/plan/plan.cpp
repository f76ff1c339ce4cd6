// Which algorithm: of the first engine that can do the problem, the one with the fewest products
// that fits the memory.
#include <algorithm>
#include <limits>
#include <optional>

#include "api/algorithms.h"
#include "core/dtype.h"
#include "core/text.h"
#include "core/validate.h"
#include "plan/decision.h"

namespace cutloss {
namespace {

struct Candidate {
  Way way;
  int products = 1;
};

// fp16 gradients are made in backward, so that the loss scale comes before the rounding.
bool has_f16_gradient(const Problem& p) {
  const Head& head = head_of(p);
  return (p.wanted.de.wanted && head.e_type == DType::f16) ||
         (p.wanted.dc.wanted && head.c_type == DType::f16) ||
         (p.wanted.dbias.wanted && head.bias_type == DType::f16);
}

std::vector<Candidate> candidates(const Problem& p, std::vector<std::string>& reasons) {
  if (!wants_gradient(p)) return {{{Schedule::none, false}, 1}};
  const int gradient_products = (p.wanted.de.wanted ? 1 : 0) + (p.wanted.dc.wanted ? 1 : 0);
  std::vector<Candidate> list;
  if (p.schedule != Schedule::vocabulary) {
    if (p.upstream.when == Upstream::at_forward && !has_f16_gradient(p)) {
      list.push_back({{Schedule::rows, false}, 1 + gradient_products});
    } else {
      reasons.push_back(p.upstream.when == Upstream::at_forward
                            ? "rows: gradients in f16 are made in backward, after the loss "
                              "scale; the logits of all rows are kept instead"
                            : "rows: the upstream gradients are known in backward only; the "
                              "logits of all rows are kept instead");
      list.push_back({{Schedule::rows, true}, 1 + gradient_products});
    }
  }
  if (p.schedule != Schedule::rows) {
    list.push_back({{Schedule::vocabulary, false}, 2 + gradient_products});
  }
  return list;
}

// The limit where nobody named one. On CUDA gradients by vocabulary need fp32 sums of dE, and where
// C is not in the products' dtype a copy of it, as PyTorch's own autocast has: what is left beside
// them must be enough to work quickly.
std::int64_t default_workspace(const Problem& p) {
  const Head& head = head_of(p);
  if (p.device != Device::cuda) return kDefaultWorkspace;
  const std::int64_t sums = row_count(p) * head.D * 4 + (std::int64_t{128} << 20);
  const std::int64_t copy =
      head.c_type == p.compute_type ? 0 : head.classes.count * head.D * size_of(p.compute_type);
  return std::max(kDefaultWorkspace, sums) + copy;
}

std::string label(const Candidate& c) {
  return text(name(c.way.schedule), c.way.keeps_logits ? " (logits kept)" : "", ", ", c.products,
              c.products == 1 ? " product" : " products");
}

const Algorithm* algorithm_of(const Engine& engine, Way way) {
  for (const Algorithm* algorithm : engine.algorithms()) {
    if (algorithm->way() == way) return algorithm;
  }
  return nullptr;
}

Plan plan_of(std::shared_ptr<const Decision> decision, const Engine& engine, const Candidate& c) {
  const Decision& d = *decision;
  Plan plan;
  plan.problem = d.problem;
  plan.algorithm = d.algorithm->name();
  plan.engine = engine.name();
  plan.schedule = c.way.schedule;
  plan.keeps_logits = c.way.keeps_logits;
  plan.products = c.products;
  plan.chunk_rows = d.sizes.chunk_rows;
  plan.kept_bytes = d.kept.bytes();
  plan.forward_workspace_bytes = d.forward.bytes();
  plan.backward_workspace_bytes = d.backward.bytes();
  plan.decision = std::move(decision);
  return plan;
}

// The plan of one engine, or nothing where the memory is too small for all its algorithms.
std::optional<Plan> plan_with(const Engine& engine, const Problem& p,
                              std::vector<std::string>& reasons, std::int64_t& smallest) {
  const std::int64_t budget = p.max_workspace.value_or(default_workspace(p));
  std::vector<std::pair<Candidate, const Algorithm*>> list;
  for (const Candidate& c : candidates(p, reasons)) {
    const Algorithm* algorithm = algorithm_of(engine, c.way);
    const std::string refusal =
        algorithm == nullptr ? "it has no such algorithm" : algorithm->refusal(p);
    if (refusal.empty()) {
      list.emplace_back(c, algorithm);
    } else {
      reasons.push_back(text(label(c), ": not by ", engine.name(), ": ", refusal));
    }
  }
  const auto attempt = [&](const Candidate& c, const Algorithm& algorithm,
                           std::int64_t bytes) -> std::optional<Plan> {
    std::int64_t needed = std::numeric_limits<std::int64_t>::max();
    if (auto decision = algorithm.decide(p, bytes, needed)) {
      return plan_of(std::move(decision), engine, c);
    }
    smallest = std::min(smallest, needed);
    reasons.push_back(text(label(c), ": needs at least ", memory_text(needed), ", but ",
                           p.max_workspace ? "max_workspace is " : "the default is ",
                           memory_text(bytes)));
    return std::nullopt;
  };
  for (const auto& [c, algorithm] : list) {
    if (auto plan = attempt(c, *algorithm, budget)) {
      reasons.push_back(
          text(label(c), ": chosen, the fewest products that fit in ", memory_text(budget)));
      return plan;
    }
  }
  if (p.max_workspace) return std::nullopt;
  // Nobody named a limit, so the loss must work: the smallest plan, whatever it takes.
  for (const auto& [c, algorithm] : list) {
    if (auto plan = attempt(c, *algorithm, smallest)) {
      reasons.push_back(
          text(label(c), ": chosen, the least memory of all, ", memory_text(smallest)));
      return plan;
    }
  }
  return std::nullopt;
}

// Where rows do not lie one after the other.
std::string gaps(const Problem& p) {
  const Head& head = head_of(p);
  std::vector<std::string> found;
  if (p.rows.length > 1 && head.e_row_stride != head.D) {
    found.push_back(text("rows of E ", head.e_row_stride));
  }
  if (p.rows.sequences > 1 && head.e_sequence_stride != p.rows.length * head.e_row_stride) {
    found.push_back(text("sequences of E ", head.e_sequence_stride));
  }
  if (head.classes.count > 1 && head.c_row_stride != head.D) {
    found.push_back(text("rows of C ", head.c_row_stride));
  }
  std::string out;
  for (const std::string& gap : found) out += (out.empty() ? "" : ", ") + gap;
  return out.empty() ? out : out + " elements apart\n";
}

}  // namespace

Plan make_plan(const Problem& problem) {
  const Problem p = validated(problem);
  std::vector<std::string> reasons;
  std::int64_t smallest = std::numeric_limits<std::int64_t>::max();
  bool supported = false;
  if (!p.engine.empty()) engine_named(p.engine);  // throws where there is none
  for (const Engine* engine : engines()) {
    if (!p.engine.empty() && engine->name() != p.engine) {
      reasons.push_back(
          text("engine ", engine->name(), ": not the one asked for (", p.engine, ")"));
      continue;
    }
    if (const std::string refusal = engine->refusal(p); !refusal.empty()) {
      reasons.push_back(text("engine ", engine->name(), ": ", refusal));
      continue;
    }
    supported = true;
    if (auto plan = plan_with(*engine, p, reasons, smallest)) {
      plan->reasons = std::move(reasons);
      return *plan;
    }
  }
  std::string all;
  for (const std::string& reason : reasons) all += "\n  " + reason;
  if (!supported) {
    throw Error(ErrorCode::unsupported, "no engine supports this problem:" + all);
  }
  if (smallest == std::numeric_limits<std::int64_t>::max()) {
    throw Error(ErrorCode::unsupported, text("no engine goes by schedule ", name(p.schedule),
                                             " here; leave the schedule to the plan:", all));
  }
  throw Error(ErrorCode::workspace,
              text("max_workspace is ", memory_text(p.max_workspace.value_or(default_workspace(p))),
                   ", but the smallest plan needs ", memory_text(smallest),
                   "; grant at least that, or leave max_workspace unset:", all));
}

std::string describe(const Plan& plan) {
  if (plan.decision == nullptr) return "an empty plan: make_plan makes plans\n";
  const Problem& p = plan.problem;
  const Head& head = head_of(p);
  const Decision& d = *plan.decision;
  const Sizes& sizes = d.sizes;
  std::string out =
      text("N ", row_count(p), "  V ", head.classes.count, "  D ", head.D, "  E ",
           name(head.e_type), "  C ", name(head.c_type), "  compute ", name(p.compute_type), "\n",
           gaps(p), "engine ", plan.engine, "  schedule ", name(plan.schedule),
           plan.keeps_logits ? " (logits kept for backward)" : "", "  products ", plan.products,
           "\n", "algorithm ", plan.algorithm, ": ");
  if (plan.schedule == Schedule::rows) out += text("chunk of ", plan.chunk_rows, " rows, ");
  out += text("blocks of ", sizes.block_rows, " rows x ", sizes.slab, " columns");
  if (sizes.gradient_rows != sizes.block_rows || sizes.gradient_slab != sizes.slab) {
    out += text(", in gradients ", sizes.gradient_rows, " x ", sizes.gradient_slab);
  }
  out += text("\nkept ", memory_text(plan.kept_bytes), ", workspace ",
              memory_text(plan.forward_workspace_bytes), " forward, ",
              memory_text(plan.backward_workspace_bytes), " backward\n");
  const auto add = [&](const char* what, const Ledger& ledger) {
    if (!ledger.bookings().empty()) out += text("  ", what, ": ", in_words(ledger), "\n");
  };
  add("kept", d.kept);
  add("forward", d.forward);
  add("backward", d.backward);
  for (const std::string& reason : plan.reasons) out += reason + "\n";
  return out;
}

std::vector<std::string> describe_machine() {
  std::vector<std::string> lines;
  for (const Engine* engine : engines()) {
    lines.push_back(text("engine ", engine->name(), ": ", engine->description()));
  }
  return lines;
}

}  // namespace cutloss
