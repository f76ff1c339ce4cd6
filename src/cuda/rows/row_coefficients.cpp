#include "cuda/rows/row_coefficients.h"

namespace cutloss::cuda {

template <class T>
const RowGradient<T>* RowCoefficientsOf<T>::of(RowRange chunk, std::int64_t entry) {
  auto* made = call_.buffer<RowGradient<T>>(buffer::kCoefficients);
  if (made_of_ != chunk) {
    Coefficients c;
    c.table = rows_.table();
    c.first = chunk.begin;
    c.count = chunk.count;
    c.rows = call_.args.rows;
    c.upstream = call_.args.upstream;
    c.class_weight = operands_.class_weight(0);
    c.classes = call_.head.classes;
    DeviceScalars* of_g = scalars();
    if (of_g != nullptr) make_scalars(c, call_.p.transform.logit_scale, of_g, call_.stream);
    make_coefficients<T>(c, of_g, made, call_.stream);
    made_of_ = chunk;
  }
  return made + (entry - chunk.begin);
}

template class RowCoefficientsOf<float>;
template class RowCoefficientsOf<double>;

}  // namespace cutloss::cuda
