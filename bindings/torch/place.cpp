#include "place.h"

namespace cutloss::binding {
namespace {

bool has_apart_rows(const Place& p) {
  std::int64_t extent = 1;
  for (int dim = 2; dim >= 0; --dim) {
    if (p.sizes[dim] == 0) return false;
    if (p.sizes[dim] == 1) continue;
    if (dim == 2 ? p.strides[dim] != 1 : p.strides[dim] < extent) return false;
    extent += (p.sizes[dim] - 1) * p.strides[dim];
  }
  return true;
}

// Hopper's copy engine reads in units of 16 bytes, from rows that are whole units apart. Parameters
// that lie in one flat buffer (FSDP) may begin anywhere, and a slice of odd rows lie at odd steps.
bool has_aligned_rows(const Place& p) {
  if (p.offset != 0) return false;
  const bool narrow = p.type == ScalarType::BFloat16 || p.type == ScalarType::Half;
  if (!narrow || p.sizes[2] % 8 != 0) return true;  // of no use to it in any case
  for (int dim = 0; dim < 2; ++dim) {
    if (p.sizes[dim] > 1 && p.strides[dim] % 8 != 0) return false;
  }
  return true;
}

}  // namespace

Place place_of(const Tensor& t) {
  Place p;
  p.sizes[0] = 1;
  for (std::int64_t from = 0, to = 3 - t.dim(); from < t.dim(); ++from, ++to) {
    p.sizes[to] = t.size(from);
    p.strides[to] = t.stride(from);
  }
  p.type = t.scalar_type();
  p.offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16);
  return p;
}

std::optional<Strides> strides_in_place(const Place& place, Device device) {
  if (!has_apart_rows(place)) return std::nullopt;
  if (device == Device::cuda && !has_aligned_rows(place)) return std::nullopt;
  // PyTorch leaves the stride arbitrary where there is one entry.
  const auto stride = [&](int dim) { return place.sizes[dim] > 1 ? place.strides[dim] : 0; };
  return Strides{stride(0), stride(1)};
}

}  // namespace cutloss::binding
