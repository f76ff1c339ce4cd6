// The options of an operator call, off the stack, in the order of the table (spec/options.inc).
#pragma once

#include <exception>
#include <optional>
#include <string>

#include "convert.h"
#include "spec/options.h"

namespace cutloss::binding {

class OptionReader {
 public:
  explicit OptionReader(Stack& stack) : stack_(stack) {}

  // Throws what was wrong with one of them, when all have been read (see Stack).
  spec::Options read(spec::Takers operators) {
    spec::Options o(operators);
#define OPTION(takers, type, name, default_value, member) \
  if (take(spec::Takers::takers, operators)) read(member);
#include "spec/options.inc"
#undef OPTION
    if (failed_) std::rethrow_exception(failed_);
    return o;
  }

 private:
  template <class Value>
  void read(Value& member) {
    member = stack_.next<Value>();
  }
  void read(DType& member) {
    const auto given = stack_.next<ScalarType>();
    settle([&] { member = dtype_of(given, "compute_dtype"); });
  }
  void read(Schedule& member) {
    const auto given = stack_.next<std::int64_t>();
    settle([&] {
      if (given < 0 || given > 3) {
        throw Error(ErrorCode::invalid_value,
                    "schedule must be 0, 1, 2 or 3, got " + std::to_string(given));
      }
      member = static_cast<Schedule>(given);
    });
  }

  template <class Settle>
  void settle(Settle settle) {
    try {
      settle();
    } catch (const Error&) {
      if (!failed_) failed_ = std::current_exception();
    }
  }

  Stack& stack_;
  std::exception_ptr failed_;
};

// The options of operators that multiply E and C.
template <>
struct Argument<spec::Options> {
  static spec::Options read(Stack& stack) { return OptionReader(stack).read(spec::Takers::linear); }
};

}  // namespace cutloss::binding
