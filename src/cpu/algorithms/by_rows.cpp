// The logits of a chunk of rows are kept, as exponentials where that will do, and its gradients are
// made of them: right after the statistics, which they may depend on, or, with every row in one
// chunk, in backward. Three products.
#include "cpu/algorithms/algorithms.h"
#include "cpu/components.h"

namespace cutloss::cpu {
namespace {

struct Steps {
  // Forward alone of a plan that makes gradients with the statistics keeps nothing: an evaluation
  // between training steps.
  template <class Parts>
  static void statistics(Parts& parts, RowRange chunk, Pass pass) {
    const bool keeps = pass == Pass::both || parts.call.d.algorithm->way.keeps_logits;
    parts.statistics.make(chunk, keeps ? &parts.kept : nullptr);
  }
  template <class Parts>
  static void gradients(Parts& parts, RowRange chunk, Pass) {
    parts.add_gradients(
        chunk, [&](const Block& block) { return parts.gradient.from_kept(block, parts.kept); });
  }
};

}  // namespace

constinit const Algorithm by_rows{
    "cpu/by_rows", {Schedule::rows, false}, nullptr, decide, open_steps<Steps, Components>};
constinit const Algorithm stored{
    "cpu/stored", {Schedule::rows, true}, nullptr, decide, open_steps<Steps, Components>};

}  // namespace cutloss::cpu
