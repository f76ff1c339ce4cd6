#pragma once

#include "cutloss/cutloss.h"

namespace cutloss {

// What problems of either source have in common. All throw Error(invalid_value), or what they say.
// Engines see shifts of at most the length.
void settle_rows(Rows& rows);
// a x b elements must have addresses.
void check_product(const char* what, std::int64_t a, std::int64_t b);
// Fills in a packed stride, or checks a given one.
void settle_stride(std::int64_t& stride, std::int64_t packed, std::int64_t count, const char* what);
// Fills in the total. The classes must lie in it.
void settle_classes(Classes& classes);
// Whether they are less than the whole vocabulary.
bool is_shard(const Classes& classes);
// Refuses as unsupported what no engine can write yet. `own`: the dtype of what it is the gradient
// of; `what`: the member of Wanted.
struct GradientRule {
  DType own;   // of what it is the gradient of
  DType sums;  // of its accumulators
  bool may_add;
};
void check_gradient(const GradientWanted& gradient, const GradientRule& rule, const char* what);
void check_transform(const Transform& transform, DType stat);
void check_upstream(const Problem& problem);
void check_device(const Problem& problem);
// `what` is a member of `args`.
void need_pointer(const void* pointer, const char* args, const char* what);
// The same of rows' states, which have an alignment.
void need_state(const void* state, const char* args, const char* what);

// The pointers of a call's rows: that those which a pass needs are given, and no upstream gradient
// that the problem does not announce.
struct RowPointers {
  const RowOutputs& rows;
  const RowGradients& upstream;
  const char* args;  // the struct whose members they are
};
void check_row_pointers(const Problem& problem, const RowPointers& given, Pass pass);

// A target and a temperature of a row, as only the data shows them.
struct Position {
  std::int64_t sequence, column;  // of the target
};
void check_target(std::int64_t target, std::int64_t V, std::int64_t ignore_index, Position at);
void check_row_temperature(double own, double in_all, DType stat, Position at);

// Every refusal that follows from a problem alone whose source is Linear. Returns the problem with
// its strides and classes filled in and its shift settled. Throws Error(invalid_value |
// invalid_type | unsupported).
Problem validated(Problem problem);

// The sizes of numbers that have a reciprocal in a stat dtype: an option outside would silently
// become 0 or infinity.
struct NumberRange {
  double least, most;
};
inline NumberRange usable_range(DType stat) {
  return stat == DType::f64 ? NumberRange{0x1p-1022, 0x1p1022} : NumberRange{0x1p-126, 0x1p126};
}

// Every refusal that follows from the pointers of a call: missing, misaligned, too small.
void check_args(const Plan& plan, const Args& args, Pass pass);

}  // namespace cutloss
