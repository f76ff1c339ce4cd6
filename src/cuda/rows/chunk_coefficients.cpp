#include "cuda/rows/chunk_coefficients.h"

namespace cutloss::cuda {

template <class T>
const RowGradient<T>* ChunkCoefficients<T>::from(RowRange chunk, std::int64_t entry) {
  auto* coefficients = call_.buffer<RowGradient<T>>(buffer::kCoefficients);
  if (chunk_made_ != chunk) {
    const Coefficients inputs{rows_.table(),     chunk.begin,         chunk.count,
                              call_.args.rows,   call_.args.upstream, operands_.class_weight(0),
                              call_.head.classes};
    DeviceScalars* g_scalars = scalars();
    if (g_scalars != nullptr) {
      make_scalars(inputs, call_.p.transform.logit_scale, g_scalars, call_.stream);
    }
    make_coefficients<T>(inputs, g_scalars, coefficients, call_.stream);
    chunk_made_ = chunk;
  }
  return coefficients + (entry - chunk.begin);
}

template class ChunkCoefficients<float>;
template class ChunkCoefficients<double>;

}  // namespace cutloss::cuda
