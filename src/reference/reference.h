// The truth for tests: the loss and its gradients in fp64, with plain loops and every logit
// stored. It shares no code with the engines; never picked by make_plan.
#pragma once

#include <cstdint>
#include <vector>

#include "cutloss/cutloss.h"

namespace cutloss::reference {

// Upstream gradients per row; an empty vector is zero.
struct RowGradients64 {
  std::vector<double> d_nll;
  std::vector<double> d_lse;
  std::vector<double> d_lse_squared;
  std::vector<double> d_entropy;
  std::vector<double> d_zbar;
};

// Everything there is to know about one loss, in doubles. Rows that are ignored are zeros
// (target and argmax: -1).
struct Result {
  std::int64_t N = 0;  // rows: sequences * (length - shift)
  std::int64_t V = 0;
  std::int64_t D = 0;
  DType compute_type = DType::f32;  // of the problem

  // The operands as the products see them: rounded to compute_type where that is bf16.
  std::vector<double> e;             // (N, D)
  std::vector<double> c;             // (V, D)
  std::vector<std::int64_t> target;  // (N)

  std::vector<double> z;      // (N, V)
  std::vector<double> slope;  // (N, V): dz/da
  std::vector<double> g;      // (N, V): dLoss/dz

  std::vector<double> nll, lse, row_max, log_sum, entropy, zbar, zbar_centred;  // (N)
  std::vector<std::int64_t> argmax;                                             // (N)

  std::vector<double> de;     // (sequences, length, D)
  std::vector<double> dc;     // (V, D)
  std::vector<double> dbias;  // (V)
};

// Statistics, and the gradients of sum_n upstream[n] * output[n]. The gradients come whatever
// problem.wanted says, and so do entropy, zbar and argmax.
// Throws Error(invalid_value) for a target that is neither ignore_index nor in [0, V).
Result evaluate(const Problem& problem, const Inputs& in, const RowGradients64& upstream = {});

// The same of a problem whose source is Logits, which are in.e; C and bias are none. The Result has
// D = 0 and no products; the gradient of a logit is g * slope * logit_scale.
Result evaluate_logits(const Problem& problem, const Inputs& in,
                       const RowGradients64& upstream = {});

// The contract of cutloss::forward and cutloss::backward, without a plan, kept or workspace.
void forward(const Problem& problem, const Args& args);
void backward(const Problem& problem, const Args& args);

// Where row n of the loss lies in E seen as (sequences * length) positions, and its target.
std::int64_t position_of_row(const Problem& problem, std::int64_t row);

// The dtype of per-row arrays.
DType stat_type(const Problem& problem);

}  // namespace cutloss::reference
