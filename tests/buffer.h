// Memory for tests: aligned, poisoned, with guards on both sides that show a write beyond the end.
// What a GPU works on has a twin there, guards included.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cutloss/cutloss.h"
#include "gpu.h"
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

  // Where a device finds the buffer. A GPU's twin is made when it is first asked for, and has the
  // host's bytes whenever these have changed since.
  std::byte* on(Device device) const {
    if (!memory_ || device == Device::cpu) return memory_ ? memory_.get() + kGuard : nullptr;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    if (!twin_) {
      twin_.reset(static_cast<std::byte*>(gpu::allocate(whole())));
      uploaded_.clear();
    }
    if (uploaded_.empty() || std::memcmp(uploaded_.data(), memory_.get(), whole()) != 0) {
      uploaded_.assign(memory_.get(), memory_.get() + whole());
      gpu::copy(twin_.get(), memory_.get(), whole());
    }
    return twin_.get() + kGuard;
  }

  // Brings the twin's bytes here, where there is a twin.
  void fetch() {
    if (!twin_) return;
    gpu::copy(memory_.get(), twin_.get(), whole());
    uploaded_.assign(memory_.get(), memory_.get() + whole());
  }

  bool guards_intact() const {
    if (!memory_) return true;
    std::vector<std::byte> guards(2 * kGuard);
    if (twin_) {
      gpu::copy(guards.data(), twin_.get(), kGuard);
      gpu::copy(guards.data() + kGuard, twin_.get() + kGuard + bytes_, kGuard);
    } else {
      std::memcpy(guards.data(), memory_.get(), kGuard);
      std::memcpy(guards.data() + kGuard, memory_.get() + kGuard + bytes_, kGuard);
    }
    for (const std::byte byte : guards) {
      if (byte != kGuardByteValue) return false;
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
  std::size_t whole() const { return static_cast<std::size_t>(bytes_ + 2 * kGuard); }

  struct Release {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlign); }
  };
  struct ReleaseTwin {
    void operator()(std::byte* memory) const { gpu::release(memory); }
  };
  std::int64_t bytes_ = 0;
  std::unique_ptr<std::byte[], Release> memory_;
  mutable std::unique_ptr<std::byte[], ReleaseTwin> twin_;
  mutable std::vector<std::byte> uploaded_;  // the host's bytes when the twin last had them
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
  void* on(Device device) const { return buffer.on(device); }
  double get(std::int64_t index) const { return reference::load(pointer(), type, index); }
  void set(std::int64_t index, double value) { reference::store(pointer(), type, index, value); }
  std::vector<double> values() const {
    std::vector<double> all(count);
    for (std::int64_t i = 0; i < count; ++i) all[i] = get(i);
    return all;
  }
};

}  // namespace cutloss::test
