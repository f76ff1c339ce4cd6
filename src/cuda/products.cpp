#include "cuda/products.h"

#include <algorithm>

#include "cuda/tuning.h"

namespace cutloss::cuda {

void Products::multiply(Product product) const {
  product.type = call_.d.operand;
  product.tf32 = call_.p.allow_tf32;
  // The library wants memory that begins at a multiple of 256 bytes. It may lie in dC.
  const Booking& booked = call_.workspace.booking(buffer::kLibrary);
  auto* begin = booked.offset < 0 ? static_cast<std::byte*>(call_.args.gradients.dc)
                                  : call_.buffer<std::byte>(buffer::kLibrary);
  const std::int64_t skip =
      static_cast<std::int64_t>((256 - reinterpret_cast<std::uintptr_t>(begin) % 256) % 256);
  const std::int64_t left = booked.bytes - skip;
  product.workspace_bytes = std::clamp<std::int64_t>(left / 256 * 256, 0, kMostLibraryBytes);
  product.workspace = product.workspace_bytes == 0 ? nullptr : begin + skip;
  cuda::multiply(product, call_.stream);
}

void Products::multiply_logits(const Matrix& e, const Matrix& c, std::int64_t rows,
                               std::int64_t columns, void* z, std::int64_t z_stride) const {
  multiply({.M = rows,
            .N = columns,
            .K = call_.head.D,
            .a = {e, false},
            .b = {c, true},
            .c = z,
            .c_stride = z_stride,
            .c_type = call_.d.stat,
            .alpha = call_.p.transform.logit_scale});
}

}  // namespace cutloss::cuda
