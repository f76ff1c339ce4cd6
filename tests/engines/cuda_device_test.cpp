// CUDA's errors, and what becomes of them; none needs a GPU.
#ifdef CUTLOSS_CUDA
#include "cuda/device.h"

#include <gtest/gtest.h>

#include <string>

#include "cutloss/error.h"

namespace cutloss::test {
namespace {

Error error_of(cudaError_t code) {
  try {
    cuda::check(code, "a test");
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {ErrorCode::internal, ""};
}

TEST(CudaDevice, SuccessIsNoError) { EXPECT_NO_THROW(cuda::check(cudaSuccess, "a test")); }

TEST(CudaDevice, ABuildForOtherGpusIsNoDefect) {
  for (const cudaError_t code : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
                                 cudaErrorUnsupportedPtxVersion}) {
    const Error error = error_of(code);
    const std::string words = error.what();
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(words.find("CUTLOSS_CUDA_ARCHITECTURES"), std::string::npos) << words;
    EXPECT_NE(words.find(cudaGetErrorName(code)), std::string::npos) << words;
  }
}

TEST(CudaDevice, OtherErrorsKeepTheirKind) {
  EXPECT_EQ(error_of(cudaErrorMemoryAllocation).code(), ErrorCode::out_of_memory);
  EXPECT_EQ(error_of(cudaErrorIllegalAddress).code(), ErrorCode::internal);
}

}  // namespace
}  // namespace cutloss::test
#endif
