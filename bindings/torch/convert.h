// Between PyTorch's stable ABI and the C++ library: arguments off the stack, dtypes, errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cutloss/cutloss.h"
#include "errors.h"

namespace cutloss::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of one operator call, taken in the order of its schema, and its results. Each
// argument that is not read is leaked.
class Stack {
 public:
  explicit Stack(StableIValue* values) : values_(values) {}

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(values_[read_++]);
  }
  template <class T>
  void put(const T& result) {
    values_[written_++] = torch::stable::detail::from(result);
  }
  // How many were taken, and given.
  std::uint64_t read() const { return read_; }
  std::uint64_t written() const { return written_; }

 private:
  StableIValue* values_;
  std::uint64_t read_ = 0;
  std::uint64_t written_ = 0;
};

// An operator is a function whose parameters and results are those of its schema, so that its types
// say what is read, all of it before the function begins. A struct stands for several arguments
// where it has a static T read(Stack&), and for several results where it has put(Stack&).
template <class T>
struct Argument {
  static T read(Stack& stack) {
    if constexpr (requires { T::read(stack); }) {
      return T::read(stack);
    } else {
      return stack.next<T>();
    }
  }
};
template <class T, std::size_t count>
struct Argument<std::array<T, count>> {
  static std::array<T, count> read(Stack& stack) {
    std::array<T, count> values;
    for (T& value : values) value = Argument<T>::read(stack);
    return values;
  }
};

template <class T>
void put(Stack& stack, const T& result) {
  if constexpr (requires { result.put(stack); }) {
    result.put(stack);
  } else {
    stack.put(result);
  }
}
template <class... T>
void put(Stack& stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... result) { (put(stack, result), ...); }, results);
}

template <class Result, class... Parameters>
void call(Stack& stack, Result (*operation)(Parameters...)) {
  // In braces: from left to right.
  std::tuple<std::remove_cvref_t<Parameters>...> arguments{
      Argument<std::remove_cvref_t<Parameters>>::read(stack)...};
  if constexpr (std::is_void_v<Result>) {
    std::apply(operation, std::move(arguments));
  } else {
    put(stack, std::apply(operation, std::move(arguments)));
  }
}

inline const char* name(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_value:
      return "value";
    case ErrorCode::invalid_type:
      return "type";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::workspace:
      return "workspace";
    case ErrorCode::out_of_memory:
      return "memory";
    case ErrorCode::internal:
      return "internal";
  }
  return "internal";
}

// An operator as PyTorch calls it on a device. Every exception reaches Python as a RuntimeError, so
// its kind travels in the message, "cutloss[kind]: ...", which python/cutloss/_torch/library.py
// reads.
template <auto operation, Device device = Device::cpu>
void boxed(StableIValue* stack, std::uint64_t arguments, std::uint64_t results) {
  const auto fail = [](const char* kind, const std::string& message) {
    throw std::runtime_error(std::string("cutloss[") + kind + "]: " + message);
  };
  try {
    Stack values(stack);
    call(values, operation);
    if (values.read() == arguments && values.written() == results) return;
    fail("internal", "an operator took " + std::to_string(values.read()) + " of " +
                         std::to_string(arguments) + " arguments, and made " +
                         std::to_string(values.written()) + " of " + std::to_string(results) +
                         " results");
  } catch (const Error& error) {
    const bool of_device = device == Device::cuda && error.code() == ErrorCode::out_of_memory;
    fail(of_device ? "device_memory" : name(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    fail("memory", "an allocation failed; use smaller inputs or free memory");
  } catch (const std::exception& error) {
    fail("pytorch", words_of(error.what()));
  }
}

inline DType dtype_of(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw Error(ErrorCode::invalid_type,
                  std::string(what) + " must be float32, float64, bfloat16 or float16, got " +
                      torch::headeronly::toString(type));
  }
}

inline IndexType index_type_of(ScalarType type) {
  if (type == ScalarType::Long) return IndexType::i64;
  if (type == ScalarType::Int) return IndexType::i32;
  throw Error(ErrorCode::invalid_type, std::string("targets must be int32 or int64, got ") +
                                           torch::headeronly::toString(type));
}

// The dtype of per-row numbers.
inline ScalarType stat_type(DType compute) {
  return compute == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace cutloss::binding
