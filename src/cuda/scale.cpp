// cuda_scale of the public interface.
#include "core/text.h"
#include "cuda/common/kernels.h"

namespace cutloss {

void cuda_scale(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
                void* stream) {
  if (count < 0) {
    throw Error(ErrorCode::invalid_value, text("cuda_scale: count must be >= 0, got ", count));
  }
  if (count == 0) return;
  if (values == nullptr || factor == nullptr) {
    throw Error(ErrorCode::invalid_value, "cuda_scale: values or factor is null");
  }
  cuda::scale(type, values, count, factor_type, factor, static_cast<cudaStream_t>(stream));
}

}  // namespace cutloss
