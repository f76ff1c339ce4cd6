// Forward keeps nothing but the statistics, backward makes the logits once more, a slab of columns
// at a time. Four products, the least memory.
#include "cpu/algorithms/algorithms.h"
#include "cpu/components.h"

namespace cutloss::cpu {
namespace {

struct Steps {
  template <class Parts>
  static void statistics(Parts& parts, RowRange chunk, Pass) {
    parts.statistics.make(chunk, nullptr);
  }
  template <class Parts>
  static void gradients(Parts& parts, RowRange chunk, Pass) {
    parts.add_gradients(chunk,
                        [&](const Block& block) { return parts.gradient.from_product(block); });
  }
};

}  // namespace

constinit const Algorithm by_vocabulary{"cpu/by_vocabulary",
                                        {Schedule::vocabulary, false},
                                        nullptr,
                                        decide,
                                        open_steps<Steps, Components>};

}  // namespace cutloss::cpu
