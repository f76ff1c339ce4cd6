// The loss of logits that already exist, and its gradient, which may take their place in memory.
// What cutloss.h says of a row holds here too, with the logits given instead of E, C and bias:
//
//   s = softcap * tanh(logit_scale * a / softcap)     (s = logit_scale * a without a softcap)
//   z = s / temperature[n]
//
// There is no plan and no workspace. forward reads the logits once; forward_backward reads them
// once and writes the gradient once, where a row fits into a processor's (on CUDA: a cluster's)
// memory between the two. Nothing is added up across rows, no call waits for the device, and the
// same call makes the same bits.
#pragma once

#include "cutloss/cutloss.h"

namespace cutloss {

// Plain facts about one loss. Sizes and strides in elements.
struct LogitsProblem {
  // Logits are (sequences, length, V), targets (sequences, length), contiguous. With shift = k the
  // logits at position p of a sequence are scored against the target at position p + k, and the
  // last k positions predict nothing: they are not rows, and their gradient is 0. The rows are
  // (sequences, length - shift); every per-row array has that many entries. Where length <= shift
  // there are none, and the gradient is 0.
  std::int64_t sequences = 1;
  std::int64_t length = 0;
  std::int64_t V = 0;
  std::int64_t shift = 0;

  // The last dimension is contiguous. 0 means packed.
  std::int64_t sequence_stride = 0;
  std::int64_t row_stride = 0;
  std::int64_t gradient_sequence_stride = 0;
  std::int64_t gradient_row_stride = 0;

  DType type = DType::f32;  // of logits and gradient; the stat dtype is f64 for f64, else f32
  IndexType target_type = IndexType::i64;

  std::int64_t ignore_index = -100;  // rows with this target are left out
  std::optional<double> softcap;     // > 0
  double logit_scale = 1.0;          // finite, not 0
  double temperature = 1.0;          // > 0; divides into a per-row temperature where one is given
  bool has_row_temperature = false;  // LogitsArgs::temperature is given
  bool has_class_weight = false;     // LogitsArgs::class_weight is given (it only enters zbar)

  // Outputs beyond nll, row_max and log_sum, which always come.
  bool wants_entropy = false;
  bool wants_zbar = false;
  bool wants_argmax = false;

  Device device = Device::cpu;
  // CUDA: blocks that share a row where its statistics are made, 1, 2, 4 or 8; more than 1 need
  // sm_90 or later. 0: chosen. For tests and measurements.
  int blocks_per_row = 0;

  bool operator==(const LogitsProblem&) const = default;
};

struct LogitsArgs {
  const void* logits = nullptr;        // (sequences, length, V)
  const void* targets = nullptr;       // (sequences, length)
  const void* temperature = nullptr;   // (rows), stat dtype, each > 0
  const void* class_weight = nullptr;  // (V), stat dtype; zbar = sum_v weight_v z_v / V
  RowOutputs rows;
  RowGradients upstream;
  // (sequences, length, V), in the dtype of the logits; written whole, rows that are ignored
  // included (zeros). May be `logits` itself, with the same strides: the gradient then takes the
  // logits' place. It must not overlap them otherwise, and nothing else may alias an output.
  void* gradient = nullptr;
  void* stream = nullptr;  // CUDA: the cudaStream_t all work is ordered on
};

// sequences * (length - shift), or 0 where length <= shift: the length of every per-row array.
std::int64_t row_count(const LogitsProblem& problem);

// All throw Error(invalid_value, invalid_type, unsupported) before anything is written. A target
// that is neither ignore_index nor in [0, V), and a temperature that is not > 0, is an error on the
// CPU; on CUDA it makes the row's nll and its gradient NaN, and no other row changes.

// Statistics of every row: reads the logits once, writes rows.
void forward(const LogitsProblem& problem, const LogitsArgs& args);

// The gradient from the statistics that forward wrote. Reads logits, rows (nll, row_max, log_sum
// and, where d_entropy is given, entropy) and upstream; writes gradient. In place it cannot be
// called again.
void backward(const LogitsProblem& problem, const LogitsArgs& args);

// Both, where the upstream gradients are known beforehand: writes rows and gradient.
void forward_backward(const LogitsProblem& problem, const LogitsArgs& args);

// loss_terms and weighted_loss of cutloss.h, for these rows.
void loss_terms(const LogitsProblem& problem, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream);
void weighted_loss(const LogitsProblem& problem, const LogitsArgs& args, void* loss,
                   const bool* undefined = nullptr);

}  // namespace cutloss
