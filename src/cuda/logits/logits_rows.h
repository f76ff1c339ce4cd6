// The kernel of losses over logits that exist: statistics of rows, their gradient, or both in one
// read and one write. As kernels.h says: launches on a stream, no atomics, a fixed order.
#pragma once

#include "cuda/rows/kernels.h"

namespace cutloss::cuda {

template <class T>
struct LogitRows {
  RowFacts facts;
  int positions = 0;  // sequences * length: rows, and positions that predict nothing
  const void* logits = nullptr;
  std::int64_t sequence_stride = 0, row_stride = 0;
  void* gradient = nullptr;  // null: none is made; may be the logits
  std::int64_t gradient_sequence_stride = 0, gradient_row_stride = 0;
  bool statistics = false;  // made here and written to `rows`; else read from there
  RowOutputs rows;          // null: not wanted
  RowGradients upstream;
  const T* class_weight = nullptr;
  // z = softcap * tanh(a / softcap) * logit_scale / temperature; 0: no softcap.
  T softcap = 0;
  T logit_scale = 1;
};

// E: the logits' type. blocks_per_row: 0, or how many share a row whose statistics are made. Throws
// Error(unsupported) where that is not possible on the device.
template <class E, class T>
void run_logit_rows(const LogitRows<T>& rows, int blocks_per_row, cudaStream_t stream);

}  // namespace cutloss::cuda
