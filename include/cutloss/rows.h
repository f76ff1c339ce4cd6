// From targets and weights to a loss: the coefficients of its rows, and the sum of the rows.
#pragma once

#include <cstdint>

#include "cutloss/call.h"

namespace cutloss {

// How rows count in a loss, in the words of PyTorch's F.cross_entropy. With t the token weight of a
// row, w that of its target's class (1 where not given), eps = label_smoothing and W = sum_v w_v:
//   t ((1 - eps) w nll + eps (W lse / V - zbar) + z_loss lse^2)
// Weights have the stat dtype.
struct Weighting {
  // The loss is divided by the sum of t w, and what z_loss adds by the sum of t.
  bool mean = false;
  double label_smoothing = 0;          // in [0, 1]
  double z_loss = 0;                   // >= 0
  const void* token_weight = nullptr;  // (sequences, length): a row's lies where its target does
  const void* class_weight = nullptr;  // (V)
};

// The coefficients of a loss, (rows) each, in the stat dtype: RowGradients that are to be written.
// Ignored rows get 0.
struct LossTerms {
  void* nll = nullptr;
  void* lse = nullptr;          // with label_smoothing, and only then
  void* lse_squared = nullptr;  // with z_loss
  void* zbar = nullptr;         // with label_smoothing
  bool* undefined = nullptr;    // one value: true for a mean of nothing, whose coefficients are 0
};

// What loss_terms must know of a problem.
struct LossRows {
  Rows rows;
  std::int64_t classes = 0;  // V, of the whole vocabulary
  // The stat dtype: f32 or f64.
  DType type = DType::f32;
  Device device = Device::cpu;
};
LossRows loss_rows(const Problem& problem);

// The bytes of one row's record in RowOutputs::state, for a stat dtype (f32 or f64).
std::int64_t row_state_bytes(DType stat);

// What close_rows reads, in the memory of rows.device.
struct RowStates {
  // (count, rows) records of row_state_bytes: the states of one shard after the other. What is
  // wanted of the rows must have been wanted of all of them.
  const void* states = nullptr;
  std::int64_t count = 0;
  // How many records lie from the begin of one shard's to that of the next; 0 means as many as
  // rows.
  std::int64_t stride = 0;
  const void* targets = nullptr;       // (sequences, length), of the whole vocabulary
  const void* class_weight = nullptr;  // (V), for zbar
  // The rows that are closed. Where its pointer is null, all rows are.
  RowList some;
  // Null, or one value: where it is false nothing is known of any row, and all outputs are NaN.
  const bool* is_right = nullptr;
};

// Merges the states that the shards of one vocabulary left of each row, in the order of the shards,
// and writes the rows' outputs, as far as they are given (all but state). Rows that are ignored get
// 0, and -1 for argmax. The same states in the same order make the same bits: every rank that has
// gathered them closes its rows alike. One kernel on the stream on CUDA. A target outside of the
// vocabulary is an error on the CPU (Error(invalid_value)) and makes the row's nll NaN on CUDA; one
// whose class is in no shard makes the row NaN. Throws Error(invalid_value, invalid_type).
void close_rows(const LossRows& rows, const RowStates& states, const RowOutputs& out, void* stream);

// Writes the states of `rows` rows in a shard that has no classes.
void empty_states(Device device, DType stat, std::int64_t rows, void* states, void* stream);

// Writes the coefficients that `weighting` gives to the rows of these targets, (sequences, length).
// All pointers are in the memory of rows.device. Sums are in fp64 in a fixed order. A target
// outside of the vocabulary has the weight of the nearest class: forward names it. On CUDA it is
// one kernel on the stream, and nothing waits. Throws Error(invalid_value, invalid_type,
// unsupported).
void loss_terms(const LossRows& rows, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream);

// Writes the loss whose coefficients are args.upstream, one number of the stat dtype at `loss`: the
// sum over rows of d_nll nll + d_lse lse + d_lse_squared lse^2 + d_zbar zbar, added up in fp64 in a
// fixed order. Ignored rows are not read. Where `undefined` is given and true, the loss is NaN.
// Both are in the memory of the problem's device.
//
// rows.zbar_centred says that d_lse and d_zbar are those of label smoothing (loss_terms), whose
// d_lse lse + d_zbar zbar is taken as d_lse log_sum + d_zbar zbar_centred: the same number, without
// the difference of two large ones where all logits of a row lie far from 0.
void weighted_loss(const Plan& plan, const Args& args, void* loss, const bool* undefined = nullptr);

// Multiplies values with *factor, both in the device's memory, ordered on the stream. Where the
// factor is 1 nothing is written, and the host need not know. It is for CUDA: on the CPU, where the
// host knows the factor, and in a build without CUDA it throws Error(unsupported).
void scale_in_place(Device device, DType type, void* values, std::int64_t count, DType factor_type,
                    const void* factor, void* stream);

}  // namespace cutloss
