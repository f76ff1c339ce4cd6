#include <cblas.h>

#include <limits>

#include "core/refuse.h"
#include "cpu/gemm/gemm.h"

namespace cutloss::cpu {
namespace {

blasint checked(std::int64_t size) {
  if (size > std::numeric_limits<blasint>::max()) {
    refuse(ErrorCode::unsupported, "OpenBLAS takes sizes and strides up to ",
           std::numeric_limits<blasint>::max(), ", got ", size, "; use f32 or a packed layout");
  }
  return static_cast<blasint>(size);
}

}  // namespace

void multiply_openblas(const Product& p) {
  const auto transpose = [](const Operand& o) { return o.transposed ? CblasTrans : CblasNoTrans; };
  cblas_dgemm(CblasRowMajor, transpose(p.a), transpose(p.b), checked(p.M), checked(p.N),
              checked(p.K), p.alpha, static_cast<const double*>(p.a.data), checked(p.a.stride),
              static_cast<const double*>(p.b.data), checked(p.b.stride), p.accumulate ? 1.0 : 0.0,
              static_cast<double*>(p.c), checked(p.c_stride));
}

std::string describe_openblas() { return openblas_get_config(); }

}  // namespace cutloss::cpu
