// The operators of a vocabulary in shards: a shard's statistics, which stay open, and the rows that
// the states of all shards close. The gradients of a shard are those of ops.cpp.
#pragma once

#include <tuple>

#include "call.h"
#include "row_tensors.h"

namespace cutloss::binding {

// open_statistics(operands, before, *, options) -> (states, kept): states (before + rows, bytes of
// a state), of which the first `before` records are the caller's to write
std::tuple<Tensor, Tensor> open_statistics(Operands operands, std::int64_t before,
                                           const spec::Options& options);
// empty_states(like, rows, stat_dtype) -> states: those of a shard without classes, where `like` is
Tensor empty_states(const Tensor& like, std::int64_t rows, ScalarType stat_dtype);
// close_rows(states (shards, before + rows, bytes), targets, class_weight, is_right, before,
//            stat_dtype, V, shift, ignore_index, wants_entropy, wants_zbar, wants_argmax)
//   -> (nll, lse, row_max, log_sum, entropy, zbar_centred, argmax)
RowTensors close_rows(const Tensor& given, Tensor targets,
                      const std::optional<Tensor>& class_weight,
                      const std::optional<Tensor>& is_right, std::int64_t before, ScalarType type,
                      std::int64_t V, std::int64_t shift, std::int64_t ignore_index,
                      bool wants_entropy, bool wants_zbar, bool wants_argmax);

}  // namespace cutloss::binding
