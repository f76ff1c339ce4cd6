#include "reference/number.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace cutloss::reference {
namespace {

struct Format {
  std::int64_t bytes;
  int digits;        // how many the significand has, the hidden one included
  int max_exponent;  // finite numbers are below 2^max_exponent
  int min_exponent;  // the smallest number above 0 is 2^min_exponent
};

Format format_of(DType type) {
  switch (type) {
    case DType::f32:
      return {4, 24, 128, -149};
    case DType::f64:
      return {8, 53, 1024, -1074};
    case DType::bf16:
      return {2, 8, 128, -133};
    case DType::f16:
      return {2, 11, 16, -24};
  }
  throw Error(ErrorCode::internal, "reference: a dtype that does not exist");
}

std::uint16_t f16_bits(double value) {  // value is a number of f16, an infinity or a NaN
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  int exponent = 0;
  const double fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1) * 2^exponent
  if (fraction == 0) return sign;
  if (exponent < -13) {  // subnormal: a multiple of 2^-24
    return sign | static_cast<std::uint16_t>(std::ldexp(std::fabs(value), 24));
  }
  const auto significand = static_cast<std::uint16_t>(std::ldexp(fraction, 11));  // 1024..2047
  return sign | static_cast<std::uint16_t>(((exponent + 14) << 10) + (significand - 1024));
}

double f16_value(std::uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  if (exponent == 31) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

template <class T>
T read(const void* array, std::int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(array) + index * std::int64_t{sizeof(T)}, sizeof(T));
  return value;
}

template <class T>
void write(void* array, std::int64_t index, T value) {
  std::memcpy(static_cast<char*>(array) + index * std::int64_t{sizeof(T)}, &value, sizeof(T));
}

}  // namespace

std::int64_t bytes_of(DType type) { return format_of(type).bytes; }

double load(const void* array, DType type, std::int64_t index) {
  switch (type) {
    case DType::f32:
      return read<float>(array, index);
    case DType::f64:
      return read<double>(array, index);
    case DType::bf16: {
      // bf16 is the upper half of an fp32 number.
      const std::uint32_t bits = std::uint32_t{read<std::uint16_t>(array, index)} << 16;
      return read<float>(&bits, 0);
    }
    case DType::f16:
      return f16_value(read<std::uint16_t>(array, index));
  }
  throw Error(ErrorCode::internal, "reference: a dtype that does not exist");
}

void store(void* array, DType type, std::int64_t index, double value) {
  const double number = rounded(value, type);
  switch (type) {
    case DType::f32:
      return write(array, index, static_cast<float>(number));
    case DType::f64:
      return write(array, index, number);
    case DType::bf16: {
      const auto exact = static_cast<float>(number);
      return write(array, index, static_cast<std::uint16_t>(read<std::uint32_t>(&exact, 0) >> 16));
    }
    case DType::f16:
      return write(array, index, f16_bits(number));
  }
}

double rounded(double value, DType type) {
  if (type == DType::f64 || value == 0 || !std::isfinite(value)) return value;
  const Format format = format_of(type);
  int exponent = 0;
  std::frexp(value, &exponent);  // |value| in [0.5, 1) * 2^exponent
  const double step = std::ldexp(1.0, std::max(exponent - format.digits, format.min_exponent));
  const double nearest = std::nearbyint(value / step) * step;
  const double beyond = std::ldexp(1.0, format.max_exponent);
  if (std::fabs(nearest) < beyond) return nearest;
  return std::copysign(std::numeric_limits<double>::infinity(), value);
}

double unit_roundoff(DType type) { return std::ldexp(1.0, -format_of(type).digits); }

double smallest(DType type) { return std::ldexp(1.0, format_of(type).min_exponent); }

}  // namespace cutloss::reference
