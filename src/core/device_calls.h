// What a device does that takes no plan: one table of functions for each. Their arguments are
// checked.
#pragma once

#include "cutloss/cutloss.h"

namespace cutloss {

// weighted_loss: a sum over the rows of `rows`, whose targets say which of them count.
struct LossSum {
  LossRows rows;
  const void* targets = nullptr;
  RowOutputs out;
  RowGradients upstream;
  const bool* undefined = nullptr;
};

struct DeviceCalls {
  void (*loss_terms)(const LossRows& rows, const Weighting& weighting, const void* targets,
                     const LossTerms& terms, void* stream);
  // To one number of the stat dtype, in the device's memory.
  void (*sum_loss)(const LossSum& sum, void* loss, void* stream);
  void (*close_rows)(const LossRows& rows, const RowStates& states, const RowOutputs& out,
                     void* stream);
  void (*empty_states)(DType stat, std::int64_t rows, void* states, void* stream);
  // Losses over logits that exist. With both passes the gradient of a row follows its statistics.
  void (*logits)(const Problem& problem, const LogitsArgs& args, Pass pass);
  // values *= *factor. Null: the device has none.
  void (*scale)(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
                void* stream);
};

}  // namespace cutloss
