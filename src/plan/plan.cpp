// Chooses the algorithm: of the first engine that can do the problem, the one whose predicted time
// is least among those that fit the memory.
#include <algorithm>
#include <limits>
#include <optional>

#include "core/dtype.h"
#include "core/refuse.h"
#include "core/text.h"
#include "core/validate.h"
#include "plan/buffers.h"
#include "plan/plan.h"

namespace cutloss {
namespace {

constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::max();

// Whether a gradient waits for the loss scale, which comes before the rounding.
bool waits_for_loss_scale(const Problem& p) {
  const Head& head = head_of(p);
  const auto waits = [](const GradientWanted& gradient, DType own) {
    return gradient.wanted && cutloss::waits_for_loss_scale(gradient.type.value_or(own));
  };
  return waits(p.wanted.de, head.e_type) || waits(p.wanted.dc, head.c_type) ||
         waits(p.wanted.dbias, head.bias_type);
}

// Says why an algorithm does not make what is wanted at the time when it is wanted: nothing where
// it does, "-" where the reason goes without saying.
std::string way_refusal(const Problem& p, Way way) {
  if (wants_gradient(p) != (way.schedule != Schedule::none)) return "-";
  if (way.schedule == Schedule::none) return "";
  if (p.schedule != Schedule::automatic && p.schedule != way.schedule) return "-";
  if (way.schedule != Schedule::rows) return "";
  const bool at_forward = p.upstream.when == Upstream::at_forward;
  const bool with_statistics = at_forward && !waits_for_loss_scale(p);
  if (way.keeps_logits) return with_statistics ? "-" : "";
  if (with_statistics) return "";
  return at_forward ? "rows: gradients in f16 are made in backward, after the loss scale; the "
                      "logits of all rows are kept instead"
                    : "rows: the upstream gradients are known in backward only; the logits of all "
                      "rows are kept instead";
}

// The limit of memory where nobody named one. On CUDA gradients by vocabulary need fp32 sums of dE,
// and a copy of C where it is not in the products' dtype, as PyTorch's own autocast has: what is
// left beside them must be enough to work quickly.
std::int64_t default_workspace(const Problem& p) {
  const Head& head = head_of(p);
  if (p.device != Device::cuda) return kDefaultWorkspace;
  const std::int64_t sums = row_count(p) * head.D * 4 + (std::int64_t{128} << 20);
  const std::int64_t copy =
      head.c_type == p.compute_type ? 0 : head.classes.count * head.D * size_of(p.compute_type);
  return std::max(kDefaultWorkspace, sums) + copy;
}

std::string label(const Problem& p, Way way) {
  const int products = products_of(p, way);
  return text(name(way.schedule), way.keeps_logits ? " (logits kept)" : "", ", ", products,
              products == 1 ? " product" : " products");
}

Plan plan_of(std::shared_ptr<const Decision> decision, const Engine& engine) {
  const Decision& d = *decision;
  const Way way = d.algorithm->way;
  Plan plan;
  plan.problem = d.problem;
  plan.algorithm = d.algorithm->name;
  plan.engine = engine.name;
  plan.schedule = way.schedule;
  plan.keeps_logits = way.keeps_logits;
  plan.products = products_of(d.problem, way);
  plan.predicted_time = d.predicted_time;
  plan.chunk_rows = d.sizes.chunk_rows;
  plan.kept_bytes = d.kept.bytes();
  plan.forward_workspace_bytes = d.forward.bytes();
  plan.backward_workspace_bytes = d.backward.bytes();
  plan.decision = std::move(decision);
  return plan;
}

// Chooses among the algorithms of one engine, and notes the reasons.
class Choice {
 public:
  Choice(const Engine& engine, const DeviceFacts& device, const Problem& p,
         std::vector<std::string>& reasons)
      : device_(device), p_(p), reasons_(reasons) {
    for (const Algorithm* algorithm : engine.algorithms) {
      std::string refusal = way_refusal(p, algorithm->way);
      if (refusal == "-") continue;
      if (refusal.empty()) {
        refusal = refusal_of(*algorithm, p, device);
        if (!refusal.empty()) {
          refusal = text(label(p, algorithm->way), ": not by ", engine.name, ": ", refusal);
        }
      }
      if (refusal.empty()) {
        can_.push_back(algorithm);
      } else {
        reasons.push_back(std::move(refusal));
      }
    }
  }

  // The decision of the least predicted time within so many bytes; null where there is none.
  std::shared_ptr<const Decision> within(std::int64_t bytes, const char* why) {
    std::shared_ptr<const Decision> best;
    for (const Algorithm* algorithm : can_) {
      std::int64_t needed = kUnknown;
      auto decision = algorithm->decide(*algorithm, p_, device_, bytes, needed);
      if (decision != nullptr) {
        if (best == nullptr || decision->predicted_time < best->predicted_time) {
          best = std::move(decision);
        }
        continue;
      }
      smallest = std::min(smallest, needed);
      reasons_.push_back(text(label(p_, algorithm->way), ": needs at least ", memory_text(needed),
                              ", but ", p_.max_workspace ? "max_workspace is " : "the default is ",
                              memory_text(bytes)));
    }
    if (best != nullptr) {
      tell_of_sums(*best);
      reasons_.push_back(
          text(label(p_, best->algorithm->way), ": chosen, ", why, " ", memory_text(bytes)));
    }
    return best;
  }

  // Tells what dE's sums cost where they have memory of their own that another dC could have lent.
  void tell_of_sums(const Decision& d) {
    const Wanted& wanted = p_.wanted;
    if (d.algorithm->way.schedule != Schedule::vocabulary || !wanted.de.wanted) return;
    const char* why = !wanted.dc.wanted ? "dC is not wanted"
                      : wanted.dc.add   ? "dC is added to"
                                        : nullptr;
    for (const Booking& booking : d.backward.bookings()) {
      if (why == nullptr || booking.name != buffer::kDeSums || !booking.lies_in.empty()) continue;
      reasons_.push_back(text("vocabulary: dE's sums take ", memory_text(booking.bytes),
                              " of their own, since ", why,
                              "; in a dC that is written they would wait for its last rows"));
    }
  }

  // The fewest bytes with which something that did not fit would have.
  std::int64_t smallest = kUnknown;

 private:
  const DeviceFacts& device_;
  const Problem& p_;
  std::vector<std::string>& reasons_;
  std::vector<const Algorithm*> can_;
};

// Makes the plan of one engine, or nothing where the memory is too small for all its algorithms.
std::optional<Plan> plan_with(const Engine& engine, const DeviceFacts& device, const Problem& p,
                              std::vector<std::string>& reasons, std::int64_t& smallest) {
  Choice choice(engine, device, p, reasons);
  auto decision =
      choice.within(p.max_workspace.value_or(default_workspace(p)), "the shortest that fits in");
  smallest = std::min(smallest, choice.smallest);
  // Nobody named a limit, so the loss must work: the smallest plan is taken, whatever it needs.
  if (decision == nullptr && !p.max_workspace && choice.smallest < kUnknown) {
    decision = choice.within(choice.smallest, "the least memory of all,");
  }
  if (decision == nullptr) return std::nullopt;
  return plan_of(std::move(decision), engine);
}

std::string in_lines(const std::vector<std::string>& reasons) {
  std::string out;
  for (const std::string& reason : reasons) out += "\n  " + reason;
  return out;
}

struct Answer {
  // Nothing where the memory is too small.
  std::optional<Plan> plan;
  std::vector<std::string> reasons;
  // The fewest bytes of what did not fit.
  std::int64_t smallest = kUnknown;
};

// What the engines say to a validated problem. Throws Error(invalid_value, unsupported).
Answer answer_of(const Problem& p, std::span<const Engine* const> engines,
                 const DeviceFacts* given) {
  Answer answer;
  std::vector<std::string>& reasons = answer.reasons;
  bool supported = false;
  if (!p.engine.empty()) engine_named(engines, p.engine);  // throws where there is none
  for (const Engine* engine : engines) {
    if (!p.engine.empty() && engine->name != p.engine) {
      reasons.push_back(text("engine ", engine->name, ": not the one asked for (", p.engine, ")"));
      continue;
    }
    const DeviceFacts& device = given != nullptr ? *given : engine->device();
    if (const std::string refusal = refusal_of(*engine, p, device); !refusal.empty()) {
      reasons.push_back(text("engine ", engine->name, ": ", refusal));
      continue;
    }
    supported = true;
    answer.plan = plan_with(*engine, device, p, reasons, answer.smallest);
    if (answer.plan) return answer;
  }
  if (!supported) {
    throw Error(ErrorCode::unsupported, "no engine supports this problem:" + in_lines(reasons));
  }
  if (answer.smallest == kUnknown) {
    throw Error(ErrorCode::unsupported,
                text("no engine goes by schedule ", name(p.schedule),
                     " here; leave the schedule to the plan:", in_lines(reasons)));
  }
  return answer;
}

std::string shard_text(const Classes& classes) {
  if (!is_shard(classes)) return "";
  return text(" (classes ", classes.first, " to ", classes.first + classes.count, " of ",
              classes.total, ")");
}

// Says which rows do not lie one after the other.
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

const Engine& engine_named(std::span<const Engine* const> engines, std::string_view name) {
  std::string known;
  for (const Engine* engine : engines) {
    if (engine->name == name) return *engine;
    known += text(known.empty() ? "" : ", ", engine->name);
  }
  refuse_value("there is no engine '", name, "' in this build; it has ", known);
}

Plan make_plan(const Problem& problem, std::span<const Engine* const> engines,
               const DeviceFacts* given) {
  const Problem p = validated(problem);
  Answer answer = answer_of(p, engines, given);
  if (answer.plan) {
    answer.plan->reasons = std::move(answer.reasons);
    return std::move(*answer.plan);
  }
  refuse(ErrorCode::workspace, "max_workspace is ",
         memory_text(p.max_workspace.value_or(default_workspace(p))),
         ", but the smallest plan needs ", memory_text(answer.smallest),
         "; grant at least that, or leave max_workspace unset:", in_lines(answer.reasons));
}

std::int64_t least_workspace(const Problem& problem, std::span<const Engine* const> engines,
                             const DeviceFacts* given) {
  Problem p = validated(problem);
  p.max_workspace = 0;
  return answer_of(p, engines, given).smallest;
}

std::string describe(const Plan& plan) {
  if (plan.decision == nullptr) return "an empty plan: make_plan makes plans\n";
  const Problem& p = plan.problem;
  const Head& head = head_of(p);
  const Decision& d = *plan.decision;
  const Sizes& sizes = d.sizes;
  std::string out =
      text("N ", row_count(p), "  V ", head.classes.count, shard_text(head.classes), "  D ", head.D,
           "  E ", name(head.e_type), "  C ", name(head.c_type), "  compute ", name(p.compute_type),
           "\n", gaps(p), "engine ", plan.engine, "  schedule ", name(plan.schedule),
           plan.keeps_logits ? " (logits kept for backward)" : "", "  products ", plan.products,
           "  predicted ", rounded(plan.predicted_time), "\n", "algorithm ", plan.algorithm, ": ");
  if (plan.schedule == Schedule::rows) out += text("chunk of ", plan.chunk_rows, " rows, ");
  out += text("blocks of ", sizes.block_rows, " rows x ", sizes.slab, " columns");
  if (sizes.gradient_rows != sizes.block_rows || sizes.gradient_slab != sizes.slab) {
    out += text(", in gradients ", sizes.gradient_rows, " x ", sizes.gradient_slab);
  }
  if (d.has_de_sums_in_dc()) {
    out += text("; columns from ", d.last.begin, " on twice, for dC in blocks of ",
                d.last.gradient_rows, " x ", d.last.gradient_slab);
  }
  out += text("\nkept ", memory_text(plan.kept_bytes), ", workspace ",
              memory_text(plan.forward_workspace_bytes), " forward, ",
              memory_text(plan.backward_workspace_bytes), " backward\n");
  const auto add = [&](const char* ledger_name, const Ledger& ledger) {
    if (!ledger.bookings().empty()) out += text("  ", ledger_name, ": ", in_words(ledger), "\n");
  };
  add("kept", d.kept);
  add("forward", d.forward);
  add("backward", d.backward);
  for (const std::string& reason : plan.reasons) out += reason + "\n";
  return out;
}

}  // namespace cutloss
