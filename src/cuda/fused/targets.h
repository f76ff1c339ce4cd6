// The targets' part of dC and dbias by rows, which x leaves out. In the rows of frequent tokens it
// nearly cancels the rest, so it is summed exactly and added before anything is rounded.
#pragma once

#include "cuda/fused/rows.h"

namespace cutloss::cuda::fused {

// Makes sums[sum_of_column[v]], the sum of target_g * E over the rows whose target is v, in their
// order, and adds the sum of target_g * inverse_scale over these rows to dbias[v].
struct TargetSums {
  Listed list;
  const float* target_g = nullptr;
  int V = 0;
  int* order = nullptr;  // (4, capacity), scratch
  int capacity = 0;      // at least list.rows
  void* sort = nullptr;  // scratch
  std::int64_t sort_bytes = 0;
  // The members from here to sum_of_column are null where dC is not wanted.
  Matrix e;                      // bf16
  int depth = 0;                 // a multiple of 8
  float* sums = nullptr;         // (capacity, depth), a row for each target that occurs
  int* sum_of_column = nullptr;  // (V), a row of sums each, or -1
  double* dbias = nullptr;       // (V) sums, or null
  // The factor for dbias, since target_g is d(loss)/d(product) with logit_scale in it.
  double inverse_scale = 1;
};
void launch_target_sums(const TargetSums& targets, cudaStream_t stream);

// The scratch bytes of the sort: what plans book, which needs no device, and what the sort asks for
// on the current device. The second must never be more than the first, or the sort fails.
std::int64_t target_sort_bytes(int capacity);
std::int64_t needed_sort_bytes(int capacity, int V);

}  // namespace cutloss::cuda::fused
