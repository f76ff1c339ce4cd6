// The statistics alone: logits are made slab by slab and forgotten. One product.
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
  static void gradients(Parts&, RowRange, Pass) {}
};

}  // namespace

constinit const Algorithm forward_algorithm{
    "cpu/forward", {Schedule::none, false}, nullptr, decide, open_steps<Steps, Components>};

}  // namespace cutloss::cpu
