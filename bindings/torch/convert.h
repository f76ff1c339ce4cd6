// Between PyTorch's stable ABI and the C++ library: arguments off the stack, dtypes, errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cutloss/cutloss.h"
#include "errors.h"

namespace cutloss::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of one operator call, taken in the order of its schema, and its results. An
// operator reads all its arguments before it can fail: each one that is not read is leaked.
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

 private:
  StableIValue* values_;
  int read_ = 0;
  int written_ = 0;
};

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
template <void (*body)(Stack&), Device device = Device::cpu>
void boxed(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const auto fail = [](const char* kind, const std::string& message) {
    throw std::runtime_error(std::string("cutloss[") + kind + "]: " + message);
  };
  try {
    Stack values(stack);
    body(values);
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
