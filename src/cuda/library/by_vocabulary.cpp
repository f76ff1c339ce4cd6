// Forward keeps nothing but the statistics, backward makes the logits once more, a slab of columns
// at a time. Four products, the least memory.
#include "cuda/library/algorithms.h"
#include "cuda/library/components.h"
#include "plan/sessions.h"

namespace cutloss::cuda::library {
namespace {

struct Steps {
  template <class Parts>
  static void statistics(Parts& parts, RowRange chunk, Pass) {
    parts.make_statistics(chunk, /*keep=*/false);
  }
  template <class Parts>
  static void gradients(Parts& parts, RowRange chunk, Pass) {
    parts.make_gradients(chunk, /*from_kept=*/false);
  }
};

}  // namespace

constinit const Algorithm by_vocabulary{"cuda/library/by_vocabulary",
                                        {Schedule::vocabulary, false},
                                        nullptr,
                                        decide,
                                        open_steps<Steps, Components>};

}  // namespace cutloss::cuda::library
