// The operators of a vocabulary in shards: a shard's statistics, which stay open, and the rows that
// the states of all shards close. The gradients of a shard are those of ops.cpp.
#pragma once

#include "convert.h"

namespace cutloss::binding {

// open_statistics(operands, before, *, options) -> (states, kept): states (before + rows, bytes of
// a state), of which the first `before` records are the caller's to write
void open_statistics(Stack& stack);
// empty_states(like, rows, stat_dtype) -> states: those of a shard without classes, where `like` is
void empty_states(Stack& stack);
// close_rows(states (shards, before + rows, bytes), targets, class_weight, is_right, before,
//            stat_dtype, V, shift, ignore_index, wants_entropy, wants_zbar, wants_argmax)
//   -> (nll, lse, row_max, log_sum, entropy, zbar_centred, argmax)
void close_rows(Stack& stack);

}  // namespace cutloss::binding
