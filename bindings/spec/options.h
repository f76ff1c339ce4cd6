// The options of a call, as every binding has them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "cutloss/problem.h"

namespace cutloss::spec {

// Which operators: over E and C, or over logits that exist. (`both` is for the table.)
enum class Takers : std::uint8_t { linear, logits, both };
constexpr bool take(Takers row, Takers operators) {
  return row == Takers::both || row == operators;
}

struct Options {
  explicit Options(Takers operators) {
    if (operators == Takers::logits) problem.source = Logits{};
  }

  // What the options say of it.
  Problem problem;
  // What the plan keeps from forward to backward: the size of the tensor that keeps it.
  std::int64_t kept_bytes = 0;
  // dE in the dtype of its sums.
  bool de_in_sums = false;
  // dC is added, in the dtype of its sums, to a tensor that `gradients_` is given.
  bool dc_adds = false;
};

// A schema with the options' part of it in place of the word OPTIONS.
std::string with_options(Takers operators, std::string_view schema);

// options.problem with what follows from the options: who reads the rows' states, in which dtype
// gradients are written, which upstream gradients may come. `when`: those are known, if there is
// any gradient.
Problem problem_of(const Options& options, Upstream when);

}  // namespace cutloss::spec
