// The kernel of losses over logits that exist. It makes statistics of rows, their gradient, or both
// in one read and one write. As those of rows/kernels.h it is launched on a stream, and has no
// atomics and a fixed order.
#pragma once

#include "cuda/rows/kernels.h"

namespace cutloss::cuda {

template <class T>
struct LogitRows {
  RowFacts facts;
  int positions = 0;  // sequences * length, which includes positions that predict nothing
  const void* logits = nullptr;
  std::int64_t sequence_stride = 0, row_stride = 0;
  void* gradient = nullptr;  // null where none is made; it may be the logits
  std::int64_t gradient_sequence_stride = 0, gradient_row_stride = 0;
  bool statistics = false;  // statistics are made and written to `rows`, and else read from there
  RowOutputs rows;          // members are null where they are not wanted
  RowGradients upstream;
  const T* class_weight = nullptr;
  // z = softcap * tanh(a / softcap) * logit_scale / temperature. A softcap of 0 is none.
  T softcap = 0;
  T logit_scale = 1;
};

// E is the logits' type. `blocks_per_row` blocks share a row whose statistics are made; 0 leaves
// the number to the kernel. Throws Error(unsupported) where so many cannot on the device. CMake
// writes a file for each instance.
template <class E, class T>
void run_logit_rows(const LogitRows<T>& rows, int blocks_per_row, cudaStream_t stream);

}  // namespace cutloss::cuda
