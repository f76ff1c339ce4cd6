#include "cutloss/cutloss.h"

#include "core/validate.h"

namespace cutloss {

std::int64_t row_count(const Problem& problem) {
  const Problem& p = problem;
  return p.sequences * (p.length - settled_shift(p.length, p.shift));
}

std::string_view name(DType type) {
  switch (type) {
    case DType::f32:
      return "f32";
    case DType::f64:
      return "f64";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
  }
  return "?";
}

std::string_view name(Schedule schedule) {
  switch (schedule) {
    case Schedule::automatic:
      return "automatic";
    case Schedule::none:
      return "none";
    case Schedule::rows:
      return "rows";
    case Schedule::vocabulary:
      return "vocabulary";
  }
  return "?";
}

}  // namespace cutloss
