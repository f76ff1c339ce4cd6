// Makes the statistics alone, in one product.
#include "cuda/fused/engine.h"
#include "cuda/fused/statistics.h"

namespace cutloss::cuda::fused {
namespace {

struct Steps {
  static void statistics(Components& parts, RowRange chunk, Pass) { make_statistics(parts, chunk); }
  static void gradients(Components&, RowRange, Pass) {}
};

}  // namespace

constinit const Algorithm forward_algorithm{
    "cuda/fused/forward", {Schedule::none, false}, nullptr, decide, open_steps<Steps>};

}  // namespace cutloss::cuda::fused
