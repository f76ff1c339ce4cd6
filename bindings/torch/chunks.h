// forward_backward taken apart (cutloss.h, chunk_count): the operators of a loss whose coefficients
// are functions of the rows' own statistics. What one call hands to the next are tensors, "state".
#pragma once

#include "convert.h"

namespace cutloss::binding {

#define CUTLOSS_CHUNK_STATE                                                                      \
  "Tensor(a!) nll, Tensor(b!) lse, Tensor(c!) row_max, Tensor(d!) log_sum, Tensor(e!) entropy, " \
  "Tensor(f!) de, Tensor(g!) dc, Tensor(h!) dbias, Tensor(i!) memory"

// chunks_begin(operands, *, options) -> (state, chunks)
void chunks_begin(Stack& stack);

// chunk_statistics(operands, state, chunk, *, options) -> [offset, count]: the chunk's rows, int64,
// lie that many bytes into `memory`. On CUDA entries of -1 stand for none.
void chunk_statistics(Stack& stack);

// chunk_gradients(operands, state, d_nll, d_lse, d_entropy, chunk, *, options)
void chunk_gradients(Stack& stack);

// chunks_finish(operands, state, *, options)
void chunks_finish(Stack& stack);

// is_read_in_place(t): whether E or C of this layout is read where it lies; otherwise each operator
// that takes it makes a copy.
void is_read_in_place(Stack& stack);

}  // namespace cutloss::binding
