// By rows: the targets' part of dC and dbias, which x leaves out. In the rows of frequent tokens it
// nearly cancels the rest, so it is summed exactly and added before anything is rounded.
#pragma once

#include "cuda/fused/rows.h"

namespace cutloss::cuda::fused {

// sums[sum_of_column[v]] = sum of target_g * E over the rows whose target is v, in their order;
// dbias[v] += that of target_g * inverse_scale.
struct TargetSums {
  Listed list;
  const float* target_g = nullptr;
  int V = 0;
  int* order = nullptr;  // (4, capacity): scratch
  int capacity = 0;      // at least list.rows
  void* sort = nullptr;  // scratch
  std::int64_t sort_bytes = 0;
  // Null where dC is not wanted, these three.
  Matrix e;                      // bf16
  int depth = 0;                 // a multiple of 8
  float* sums = nullptr;         // (capacity, depth); one row for each target that occurs
  int* sum_of_column = nullptr;  // (V): a row of sums, or -1
  double* dbias = nullptr;       // (V) sums, or null
  // Of dbias: target_g is d(loss)/d(product), and logit_scale is out again.
  double inverse_scale = 1;
};
void launch_target_sums(const TargetSums& targets, cudaStream_t stream);

// Scratch bytes of the sort: what plans book, which takes no device, and what the sort asks for on
// the current device. Never more, or the sort fails.
std::int64_t target_sort_bytes(int capacity);
std::int64_t needed_sort_bytes(int capacity, int V);

}  // namespace cutloss::cuda::fused
