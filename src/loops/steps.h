// The steps of algorithms that hold the logits of a block in memory, over the components (Parts) of
// an engine, which has these:
//   void make_statistics(RowRange chunk, bool keep);       // whose logits are kept, or forgotten
//   void make_gradients(RowRange chunk, bool from_kept);   // else from logits that are made again
#pragma once

#include "plan/algorithm.h"

namespace cutloss {

// The statistics alone: logits are made slab by slab and forgotten. One product.
struct ForwardSteps {
  template <class Parts>
  static void statistics(Parts& parts, RowRange chunk, Pass) {
    parts.make_statistics(chunk, /*keep=*/false);
  }
  template <class Parts>
  static void gradients(Parts&, RowRange, Pass) {}
};

// The logits of a chunk of rows are kept, as exponentials where that will do, and its gradients are
// made of them: right after the statistics, which they may depend on, or, with every row in one
// chunk, in backward. Three products.
struct KeepingSteps {
  // Forward alone of a plan that makes gradients with the statistics keeps nothing: an evaluation
  // between training steps.
  template <class Parts>
  static void statistics(Parts& parts, RowRange chunk, Pass pass) {
    parts.make_statistics(chunk, pass == Pass::both || parts.call.d.algorithm->way.keeps_logits);
  }
  template <class Parts>
  static void gradients(Parts& parts, RowRange chunk, Pass) {
    parts.make_gradients(chunk, /*from_kept=*/true);
  }
};

// Forward keeps nothing but the statistics, and backward makes the logits once more, a slab of
// columns at a time. Four products, the least memory.
struct RecomputingSteps : ForwardSteps {
  template <class Parts>
  static void gradients(Parts& parts, RowRange chunk, Pass) {
    parts.make_gradients(chunk, /*from_kept=*/false);
  }
};

}  // namespace cutloss
