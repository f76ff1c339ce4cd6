#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <vector>

namespace cutloss::binding {
namespace {

Device device_of(const Tensor& tensor) { return tensor.is_cuda() ? Device::cuda : Device::cpu; }

std::string place(Device device, std::int32_t index) {
  return device == Device::cuda ? "cuda:" + std::to_string(index) : "cpu";
}

using GetStream = AOTITorchError (*)(std::int32_t device_index, void** stream);

// A C function of PyTorch's stable interface, but of libtorch_cuda: linked to it, this library
// could not be loaded where PyTorch is a CPU build (docs/decisions/0005).
GetStream get_stream() {
  static const GetStream found = [] {
    constexpr char kName[] = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, kName);
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (found == nullptr) {
    throw Error(ErrorCode::unsupported,
                "the tensors are on a CUDA device, but the process holds no libtorch_cuda.so with "
                "aoti_torch_get_current_cuda_stream in it: cutloss needs PyTorch's CUDA build, "
                "2.10 or later (ROCm is not supported); or use impl='torch'");
  }
  return found;
}

}  // namespace

OnDevice::OnDevice(const Tensor& tensor, const char* what)
    : device_(device_of(tensor)), what_(what) {
  if (!is_cuda()) return;
  index_ = tensor.get_device_index();
  guard_.emplace(index_);
}

void* OnDevice::stream() const {
  if (!is_cuda()) return nullptr;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream()(index_, &stream));
  return stream;
}

void OnDevice::require_here(const Tensor& tensor, const char* what) const {
  const Device device = device_of(tensor);
  const std::int32_t index = device == Device::cuda ? tensor.get_device_index() : -1;
  if (device == device_ && index == index_) return;
  throw Error(ErrorCode::invalid_value, "all tensors must be on one device: " + std::string(what_) +
                                            " is on " + place(device_, index_) + ", " + what +
                                            " on " + place(device, index));
}

Error could_not_allocate(Device device, const std::string& what) {
  // PyTorch's own first words, by which programs know that they may try with less.
  return {ErrorCode::out_of_memory, device == Device::cuda
                                        ? "CUDA out of memory. cutloss could not allocate " + what
                                        : "could not allocate " + what};
}

// By the C function that compiled graphs call: going by an operator's name takes about a
// microsecond for each of a call's many small results.
Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType type) {
  const std::vector<std::int64_t> shape(sizes);
  std::vector<std::int64_t> strides(shape.size(), 1);
  std::int64_t elements = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = elements;
    elements *= shape[i];
  }
  const auto dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  try {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()),
                                                    shape.data(), strides.data(), dtype, device,
                                                    like.get_device_index(), &made));
  } catch (const std::runtime_error&) {
    if (!may_be_out_of_memory()) throw;
    throw could_not_allocate(device_of(like), "a result of " + std::to_string(elements) +
                                                  " elements of " +
                                                  torch::headeronly::toString(type));
  }
  return Tensor(made);
}

Tensor packed(const Tensor& t, const char* what) {
  return t.is_contiguous() ? t : packed_copy(t, what);
}

Tensor packed_copy(const Tensor& t, const char* what) {
  try {
    return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
  } catch (const std::runtime_error&) {
    if (!may_be_out_of_memory()) throw;
    throw could_not_allocate(device_of(t), std::string("a copy of ") + what + ", " +
                                               std::to_string(t.numel()) + " elements of " +
                                               torch::headeronly::toString(t.scalar_type()) +
                                               ", whose layout is not one that is read in place");
  }
}

Workspace::Workspace(const Tensor& like, std::int64_t bytes) {
  if (bytes == 0) return;
  const auto fail = [&] {
    throw could_not_allocate(device_of(like),
                             "a workspace of " + std::to_string(bytes) +
                                 " bytes; grant less with max_workspace, or free memory");
  };
  if (like.is_cuda()) {
    try {
      tensor_ = new_tensor(like, {bytes}, ScalarType::Byte);
    } catch (const Error&) {  // new_tensor's: there is no memory for it
      fail();
    }
    data_ = tensor_->mutable_data_ptr();
    return;
  }
  const auto size = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, size);
  if (data_ == nullptr) fail();
}

Workspace::~Workspace() {
  if (!tensor_) std::free(data_);
}

}  // namespace cutloss::binding
