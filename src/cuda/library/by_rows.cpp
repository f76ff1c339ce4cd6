// The logits of a chunk of rows are kept, as exponentials where that will do, and its gradients are
// made of them: right after the statistics, which they may depend on, or, with every row in one
// chunk, in backward. Three products.
#include "cuda/library/algorithms.h"
#include "cuda/library/components.h"
#include "plan/sessions.h"

namespace cutloss::cuda::library {
namespace {

struct Steps {
  // Forward alone of a plan that makes gradients with the statistics keeps nothing: an evaluation
  // between training steps.
  template <class Parts>
  static void statistics(Parts& parts, RowRange chunk, Pass pass) {
    const bool keeps = pass == Pass::both || parts.call.d.algorithm->way.keeps_logits;
    parts.make_statistics(chunk, keeps);
  }
  template <class Parts>
  static void gradients(Parts& parts, RowRange chunk, Pass) {
    parts.make_gradients(chunk, /*from_kept=*/true);
  }
};

}  // namespace

constinit const Algorithm by_rows{"cuda/library/by_rows",
                                  {Schedule::rows, false},
                                  nullptr,
                                  decide,
                                  open_steps<Steps, Components>};
constinit const Algorithm stored{
    "cuda/library/stored", {Schedule::rows, true}, nullptr, decide, open_steps<Steps, Components>};

}  // namespace cutloss::cuda::library
