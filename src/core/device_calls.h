// What a device does without a plan: each device has one table of functions. Their callers have
// checked the arguments.
#pragma once

#include "cutloss/cutloss.h"

namespace cutloss {

// The arguments of weighted_loss: a sum over `rows`, whose targets say which of them count.
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
  // Writes one number of the stat dtype, in the device's memory.
  void (*sum_loss)(const LossSum& sum, void* loss, void* stream);
  void (*close_rows)(const LossRows& rows, const RowStates& states, const RowOutputs& out,
                     void* stream);
  void (*empty_states)(DType stat, std::int64_t rows, void* states, void* stream);
  // Computes losses over logits that exist. With Pass::both a row's gradient follows its
  // statistics.
  void (*logits)(const Problem& problem, const LogitsArgs& args, Pass pass);
  // Multiplies values with *factor. It is null where the device has no such function.
  void (*scale)(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
                void* stream);
};

}  // namespace cutloss
