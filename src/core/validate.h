// Every refusal of the library is made here, once.
#pragma once

#include "cutloss/cutloss.h"

namespace cutloss {

// The first functions serve problems of either source. All throw Error(invalid_value), or what
// their own comment says. settle_rows leaves a shift of at most the length.
void settle_rows(Rows& rows);
// Refuses a x b elements where they are more than addresses.
void check_product(const char* member, std::int64_t a, std::int64_t b);
// Fills in a packed stride, or checks a given one.
void settle_stride(std::int64_t& stride, std::int64_t packed, std::int64_t count,
                   const char* member);
// Fills in the total, and refuses classes that do not lie in it.
void settle_classes(Classes& classes);
// Whether the classes are less than the whole vocabulary.
bool is_shard(const Classes& classes);
// Refuses a gradient that no engine can write as unsupported. `what` is the member of Wanted.
struct GradientRule {
  DType own;   // the dtype of what it is the gradient of
  DType sums;  // the dtype of its accumulators
  bool may_add;
};
void check_gradient(const GradientWanted& gradient, const GradientRule& rule, const char* member);
void check_transform(const Transform& transform, DType stat);
void check_upstream(const Problem& problem);
void check_device(const Problem& problem);
// Refuses a null pointer. `what` is a member of `args`.
void need_pointer(const void* pointer, const char* args, const char* member);
// Does the same for rows' states, which must be aligned, too.
void need_state(const void* state, const char* args, const char* member);

// Refuses a call whose rows lack a pointer that the pass needs, or have an upstream gradient that
// the problem does not announce.
struct RowPointers {
  const RowOutputs& rows;
  const RowGradients& upstream;
  const char* args;  // the struct whose members they are
};
void check_row_pointers(const Problem& problem, const RowPointers& given, Pass pass);

// The place of a target, for messages about a row's data.
struct Position {
  std::int64_t sequence, column;
};
void check_target(std::int64_t target, std::int64_t V, std::int64_t ignore_index, Position at);
void check_row_temperature(double own, double in_all, DType stat, Position at);

// Makes every refusal that follows from a problem alone whose source is Linear. Returns the problem
// with its strides and classes filled in and its shift settled. Throws Error(invalid_value |
// invalid_type | unsupported).
Problem validated(Problem problem);

// The range of numbers that have a reciprocal in a stat dtype: an option outside of it would
// silently become 0 or infinity.
struct NumberRange {
  double least, most;
};
inline NumberRange usable_range(DType stat) {
  return stat == DType::f64 ? NumberRange{0x1p-1022, 0x1p1022} : NumberRange{0x1p-126, 0x1p126};
}

// Refuses a quotient of two options, with which engines compute, outside of that range.
void check_quotient(const char* member, double value, DType stat);

// Makes every refusal that follows from the pointers of a call, which may be missing or misaligned.
void check_args(const Plan& plan, const Args& args, Pass pass);

}  // namespace cutloss
