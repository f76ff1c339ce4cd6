// The statistics alone: logits are made slab by slab and forgotten. One product.
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
  static void gradients(Parts&, RowRange, Pass) {}
};

}  // namespace

constinit const Algorithm forward_algorithm{"cuda/library/forward",
                                            {Schedule::none, false},
                                            nullptr,
                                            decide,
                                            open_steps<Steps, Components>};

}  // namespace cutloss::cuda::library
