// The coefficients of a loss in one tensor, (k, rows): that of nll; with label smoothing those of
// lse and zbar; with z-loss that of lse^2. So k says which there are.
#pragma once

#include <cstdint>
#include <optional>

#include "convert.h"

namespace cutloss::binding {

// The row of each in the tensor; -1: there is none.
struct TermOrder {
  std::int64_t count = 1;
  int nll = 0, lse = -1, zbar = -1, lse_squared = -1;

  TermOrder(bool smooth, bool z_loss) {
    if (smooth) {
      lse = 1;
      zbar = 2;
      count = 3;
    }
    if (z_loss) lse_squared = static_cast<int>(count++);
  }
  explicit TermOrder(std::int64_t count) : TermOrder(count >= 3, count % 2 == 0) {}
};

// How rows count, with weights as tensors in the stat dtype: two arguments by position and, behind
// what else there is, CUTLOSS_ROW_WEIGHTS.
struct WeightTensors {
  std::optional<Tensor> of_tokens;   // (sequences, length)
  std::optional<Tensor> of_classes;  // (V)

  static WeightTensors read(Stack& stack) {
    return {stack.next<std::optional<Tensor>>(), stack.next<std::optional<Tensor>>()};
  }
};
struct RowWeights {
  bool mean = false;
  double label_smoothing = 0, z_loss = 0;

  static RowWeights read(Stack& stack) {
    return {stack.next<bool>(), stack.next<double>(), stack.next<double>()};
  }
};

#define CUTLOSS_ROW_WEIGHTS "bool mean=True, float label_smoothing=0.0, float z_loss=0.0"

struct Terms {
  Tensor terms;
  Tensor undefined;  // one bool: they are those of the mean of nothing

  void put(Stack& stack) const {
    stack.put(terms);
    stack.put(undefined);
  }
};

// `targets`: (sequences, length), packed, as `rows` has them.
Terms make_terms(const LossRows& rows, const WeightTensors& tensors, const RowWeights& weights,
                 const Tensor& targets);

// loss_terms(targets, token_weight, class_weight, compute_dtype, V, shift, ignore_index, mean,
//            label_smoothing, z_loss) -> (terms, undefined)
Terms loss_terms(Tensor targets, const WeightTensors& tensors, ScalarType compute, std::int64_t V,
                 std::int64_t shift, std::int64_t ignore_index, const RowWeights& weights);

}  // namespace cutloss::binding
