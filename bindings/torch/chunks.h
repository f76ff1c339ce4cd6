// forward_backward taken apart (cutloss.h, chunk_count): the operators of a loss whose coefficients
// are functions of the rows' own statistics. What one call hands to the next are tensors, "state".
#pragma once

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "call.h"

namespace cutloss::binding {

#define CUTLOSS_CHUNK_STATE                                                                      \
  "Tensor(a!) nll, Tensor(b!) lse, Tensor(c!) row_max, Tensor(d!) log_sum, Tensor(e!) entropy, " \
  "Tensor(f!) de, Tensor(g!) dc, Tensor(h!) dbias, Tensor(i!) memory"

struct ChunkState {
  Tensor nll, lse, row_max, log_sum, entropy, de, dc, dbias, memory;

  std::array<Tensor*, 9> all() {
    return {&nll, &lse, &row_max, &log_sum, &entropy, &de, &dc, &dbias, &memory};
  }
  static ChunkState read(Stack& stack);
  void put(Stack& stack) const;
};

// chunks_begin(operands, *, options) -> (state, chunks)
std::tuple<ChunkState, std::int64_t> chunks_begin(Operands operands, const spec::Options& options);

// chunk_statistics(operands, state, chunk, *, options) -> [offset, count]: the chunk's rows, int64,
// lie that many bytes into `memory`. On CUDA entries of -1 stand for none.
std::vector<std::int64_t> chunk_statistics(Operands operands, const ChunkState& state,
                                           std::int64_t chunk, const spec::Options& options);

// chunk_gradients(operands, state, d_nll, d_lse, d_entropy, chunk, *, options)
void chunk_gradients(Operands operands, const ChunkState& state,
                     const std::array<std::optional<Tensor>, 3>& upstream, std::int64_t chunk,
                     const spec::Options& options);

// chunks_finish(operands, state, *, options)
void chunks_finish(Operands operands, const ChunkState& state, const spec::Options& options);

// is_read_in_place(t): whether E or C of this layout is read where it lies; otherwise each operator
// that takes it makes a copy.
bool is_read_in_place(const Tensor& t);

}  // namespace cutloss::binding
