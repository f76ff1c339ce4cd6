// The loss of logits that already exist, and its gradient, which may take their place in memory.
// What cutloss.h says of a row holds here too, with the logits given instead of E, C and bias:
//
//   s = softcap * tanh(logit_scale * a / softcap)     (s = logit_scale * a without a softcap)
//   z = s / temperature[n]
//
// The calls take a problem whose source is Logits. There is no plan and no workspace. forward reads
// the logits once; forward_backward reads them once and writes the gradient once, where a row fits
// into a processor's (on CUDA: a cluster's) memory between the two. Nothing is added up across
// rows, no call waits for the device, and the same call makes the same bits.
#pragma once

#include "cutloss/call.h"

namespace cutloss {

struct LogitsArgs {
  const void* logits = nullptr;        // (sequences, length, V)
  const void* targets = nullptr;       // (sequences, length)
  const void* temperature = nullptr;   // (rows), stat dtype, each > 0
  const void* class_weight = nullptr;  // (V), stat dtype; zbar = sum_v weight_v z_v / V
  RowOutputs rows;
  RowGradients upstream;
  // (sequences, length, V), in the dtype of the logits; written whole, positions that predict
  // nothing and rows that are ignored included (zeros). The address of the logits where these are
  // overwritten. It must not overlap them otherwise, and nothing else may alias an output.
  void* gradient = nullptr;
  void* stream = nullptr;  // CUDA: the cudaStream_t all work is ordered on
};

// The stat dtype of these calls is f64 for logits in f64, else f32.
//
// All calls throw Error(invalid_value, invalid_type, unsupported) before anything is written. A
// target that is neither ignore_index nor in [0, V), and a temperature that is not > 0, is an error
// on the CPU; on CUDA it makes the row's nll and its gradient NaN, and no other row changes.

// Makes the statistics of every row: reads the logits once, writes rows.
void forward(const Problem& problem, const LogitsArgs& args);

// Makes the gradient from the statistics that forward wrote: reads logits, rows (nll, row_max,
// log_sum and, where d_entropy is given, entropy) and upstream, writes gradient. Where the logits
// are overwritten it cannot be called again. It needs a problem with wanted.dlogits.
void backward(const Problem& problem, const LogitsArgs& args);

// Makes statistics and gradient, where the upstream gradients are known beforehand: writes rows and
// gradient. It needs a problem with wanted.dlogits.
void forward_backward(const Problem& problem, const LogitsArgs& args);

// Does for these rows what weighted_loss of rows.h does for a plan's.
void weighted_loss(const Problem& problem, const LogitsArgs& args, void* loss,
                   const bool* undefined = nullptr);

}  // namespace cutloss
