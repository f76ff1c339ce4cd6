// The matrix library's products in a call.
#pragma once

#include "cuda/call.h"
#include "cuda/cublaslt.h"

namespace cutloss::cuda {

class Products {
 public:
  explicit Products(const Call& call) : call_(call) {}

  // Adds the dtype, the library's own memory and tf32 to a product, and runs it.
  void multiply(Product product) const;
  // Writes z = logit_scale E C^T.
  void multiply_logits(const Matrix& e, const Matrix& c, std::int64_t rows, std::int64_t columns,
                       void* z, std::int64_t z_stride) const;

 private:
  const Call& call_;
};

}  // namespace cutloss::cuda
