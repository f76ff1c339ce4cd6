// Memory for tests: aligned, poisoned, with guards on both sides that show a write beyond the end.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cutloss/cutloss.h"
#include "reference/number.h"

namespace cutloss::test {

class Buffer {
 public:
  Buffer() = default;
  // All bytes 0xff: a NaN in every dtype, -1 in every integer.
  explicit Buffer(std::int64_t bytes)
      : bytes_(bytes),
        memory_(static_cast<std::byte*>(::operator new(bytes + 2 * kGuard, kAlign))) {
    std::memset(memory_.get(), kGuardByte, bytes + 2 * kGuard);
    std::memset(data(), 0xff, bytes);
  }

  std::byte* data() { return memory_ ? memory_.get() + kGuard : nullptr; }
  const std::byte* data() const { return memory_ ? memory_.get() + kGuard : nullptr; }
  std::int64_t bytes() const { return bytes_; }

  bool guards_intact() const {
    if (!memory_) return true;
    for (std::int64_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != kGuardByteValue || memory_[kGuard + bytes_ + i] != kGuardByteValue) {
        return false;
      }
    }
    return true;
  }

  bool same_bytes(const Buffer& other) const {
    return bytes_ == other.bytes_ &&
           (bytes_ == 0 || std::memcmp(data(), other.data(), bytes_) == 0);
  }

 private:
  static constexpr std::int64_t kGuard = 256;
  static constexpr std::align_val_t kAlign{64};
  static constexpr int kGuardByte = 0xa5;
  static constexpr std::byte kGuardByteValue{kGuardByte};
  struct Release {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlign); }
  };
  std::int64_t bytes_ = 0;
  std::unique_ptr<std::byte[], Release> memory_;
};

// An array of one dtype.
struct Array {
  DType type = DType::f32;
  std::int64_t count = 0;
  Buffer buffer;

  Array() = default;
  Array(DType array_type, std::int64_t array_count)
      : type(array_type),
        count(array_count),
        buffer(array_count * reference::bytes_of(array_type)) {}

  void* pointer() { return buffer.data(); }
  const void* pointer() const { return buffer.data(); }
  double get(std::int64_t index) const { return reference::load(pointer(), type, index); }
  void set(std::int64_t index, double value) { reference::store(pointer(), type, index, value); }
  std::vector<double> values() const {
    std::vector<double> all(count);
    for (std::int64_t i = 0; i < count; ++i) all[i] = get(i);
    return all;
  }
};

}  // namespace cutloss::test
