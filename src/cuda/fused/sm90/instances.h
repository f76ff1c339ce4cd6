// Declares the instances of the kernels without the headers that they are compiled with.
#pragma once

#include "cuda/fused/kernels.h"

namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass
namespace cute {
using cutlass::bfloat16_t;
using cutlass::half_t;
}  // namespace cute

namespace cutloss::cuda::fused::sm90 {

// An instance for an element type. With kSharesRows clusters share rows, not columns; with kAll
// entropy, zbar and argmax are made, too.
template <class Element, bool kSharesRows, bool kAll>
void launch_statistics_instance(const Logits& logits, const Statistics& statistics,
                                const Grid& grid, cudaStream_t stream);
// The kinds of g: a multiple of p; of p and the softcap's slope; with terms of entropy and zbar,
// without a softcap and with one.
enum class GradientKind { plain, capped, general, general_capped };
template <class Element, GradientKind kKind>
void launch_gradient_instance(const Logits& logits, const GradientOfLogits& gradient,
                              const Grid& grid, cudaStream_t stream);

void launch_exponentials(const Logits& logits, const Exponentials& exponentials, const Grid& grid,
                         cudaStream_t stream);
void launch_dc(const DcProduct& product, const Grid& grid, cudaStream_t stream);
void launch_de(const DeProduct& product, const Grid& grid, cudaStream_t stream);
void launch_dc_and_de(const DcProduct& dc, const DeProduct& de, const Grid& grid,
                      cudaStream_t stream);

}  // namespace cutloss::cuda::fused::sm90
