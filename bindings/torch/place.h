// Whether E and C are read where they lie. The plan of a call is asked for before the call, without
// its tensors: both decide here, so that they agree.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "convert.h"

namespace cutloss::binding {

// E (sequences, length, D) or C (1, V, D) in memory.
struct Place {
  std::array<std::int64_t, 3> sizes{};
  std::array<std::int64_t, 3> strides{};
  ScalarType type = ScalarType::Float;
  std::int64_t offset = 0;  // of the first element, in bytes past a multiple of 16
};

Place place_of(const Tensor& t);

// A problem's strides; 0 is packed.
struct Strides {
  std::int64_t sequence = 0;
  std::int64_t row = 0;
};

// The strides with which the library reads a tensor in place: views with rows apart and in order
// (slices, a padded leading dimension). Nothing for any other, which it reads from a packed copy.
std::optional<Strides> strides_in_place(const Place& place, Device device);

}  // namespace cutloss::binding
