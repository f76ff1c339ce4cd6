// Where a call's tensors are, and what the library must be told about it: the device is made
// current for the call, its stream is asked for, its memory comes from PyTorch's allocator.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>

#include "convert.h"

namespace cutloss::binding {

// Makes the device of a tensor current while it lives (nothing to do on the CPU).
class OnDevice {
 public:
  // `what`: the tensor's name in messages.
  explicit OnDevice(const Tensor& tensor, const char* what = "e");

  Device device() const { return device_; }
  bool is_cuda() const { return device_ == Device::cuda; }
  std::int32_t index() const { return index_; }  // -1 on the CPU
  // The stream that PyTorch orders its own work on at this moment; null on the CPU.
  void* stream() const;
  // Throws where a tensor is elsewhere.
  void require_here(const Tensor& tensor, const char* what) const;

 private:
  Device device_ = Device::cpu;
  std::int32_t index_ = -1;
  const char* what_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The error of an allocation that failed; `what`, as "a workspace of 12 bytes".
Error could_not_allocate(Device device, const std::string& what);

// An uninitialised tensor on the device of another.
Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType type);

// Its first element; null where it has none.
inline void* data(const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

// A packed copy, or the tensor itself where it is packed. `what`: its name in messages.
Tensor packed(const Tensor& t, const char* what);
// A packed copy in any case.
Tensor packed_copy(const Tensor& t, const char* what);

// Scratch memory of one call: the host's own, or PyTorch's on a device, where it is ordered on the
// current stream and may be reused by what follows there.
class Workspace {
 public:
  Workspace(const Tensor& like, std::int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

}  // namespace cutloss::binding
