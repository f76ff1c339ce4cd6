#include "cuda/fused/sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "core/dtype.h"
#include "core/refuse.h"

namespace cutloss::cuda::fused::sm90 {
namespace {

// The one function of the driver's own interface that is needed. It is looked up at run time, so
// that nothing links to libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) entry = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return function;
}

CUtensorMapDataType data_type(DType type) {
  return type == DType::f32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : type == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType type, std::int64_t rows, std::int64_t columns,
                       std::int64_t stride, int box_rows, int box_columns) {
  if (encoder() == nullptr) {
    refuse(ErrorCode::unsupported,
           "the CUDA driver has no cuTensorMapEncodeTiled: update it to 525 or later");
  }
  CUtensorMap map;
  const cuuint64_t extent[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride * size_of(type))};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult result =
      encoder()(&map, data_type(type), 2, const_cast<void*>(data), extent, pitch, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    refuse(ErrorCode::internal, "the driver refused to describe a matrix of ", rows, " x ", columns,
           " with rows ", stride, " elements apart at address ", data, " (error ",
           static_cast<int>(result), ")");
  }
  return map;
}

}  // namespace cutloss::cuda::fused::sm90
