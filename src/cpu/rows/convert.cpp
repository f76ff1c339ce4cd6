#include "cpu/rows/convert.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/refuse.h"
#include "cpu/rows/row_ops.h"

namespace cutloss::cpu {
namespace {

void to_float(DType type, const void* from, float* to, std::int64_t count) {
  const auto* bits = static_cast<const std::uint16_t*>(from);
  type == DType::bf16 ? bf16_to_float(bits, to, count) : f16_to_float(bits, to, count);
}

void from_float(const float* from, DType type, void* to, std::int64_t count) {
  auto* bits = static_cast<std::uint16_t*>(to);
  type == DType::bf16 ? float_to_bf16(from, bits, count) : float_to_f16(from, bits, count);
}

}  // namespace

void convert(DType from_type, const void* from, DType to_type, void* to, std::int64_t count) {
  if (from_type == to_type) {
    std::memcpy(to, from, static_cast<std::size_t>(count * size_of(to_type)));
    return;
  }
  if (from_type == DType::f64 || to_type == DType::f64) {
    refuse(ErrorCode::internal, "conversion from ", name(from_type), " to ", name(to_type));
  }
  if (from_type == DType::f32) {
    from_float(static_cast<const float*>(from), to_type, to, count);
  } else if (to_type == DType::f32) {
    to_float(from_type, from, static_cast<float*>(to), count);
  } else {  // between the two 16-bit dtypes, through f32
    std::array<float, 512> piece;
    for (std::int64_t i = 0; i < count; i += std::ssize(piece)) {
      const std::int64_t n = std::min<std::int64_t>(std::ssize(piece), count - i);
      to_float(from_type, at(from, from_type, i), piece.data(), n);
      from_float(piece.data(), to_type, at(to, to_type, i), n);
    }
  }
}

}  // namespace cutloss::cpu
