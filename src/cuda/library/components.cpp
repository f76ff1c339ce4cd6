#include "cuda/library/components.h"

#include <algorithm>

namespace cutloss::cuda::library {

template <class T>
void Components<T>::begin() {
  rows.list();
  operands.begin();
}

template <class T>
void Components<T>::make_statistics(RowRange chunk, bool keep) {
  sweep(
      Columns{0, call.head.classes.count}, call.d.forward_slab, chunk, call.d.forward_rows,
      [&](const Block& block) { add_statistics(block, keep); }, [](Columns) {});
  finish_rows<T>(rows.table(), chunk.begin, chunk.count, call.buffer<RowState<T>>(buffer::kStates),
                 operands.class_weight(0), rows.wanted_outputs(), call.head.classes, call.stream);
}

template <class T>
void Components<T>::add_statistics(const Block& block, bool keep) {
  T* z = call.buffer<T>(buffer::kZ);
  const std::int64_t stride = padded(call.d.forward_slab, call.d.stat);
  products.multiply_logits(operands.e(block.rows, block.chunk), operands.c(block.columns),
                           block.rows.count, block.columns.count, z, stride);
  const std::int64_t in_chunk = block.rows.begin - block.chunk.begin;
  SlabStatistics<T> statistics;
  statistics.block = logit_block(z, stride, block.rows, block.columns);
  statistics.states = call.buffer<RowState<T>>(buffer::kStates) + in_chunk;
  statistics.entropy = call.p.wanted.entropy;
  statistics.argmax = call.p.wanted.argmax;
  statistics.zbar = call.p.wanted.zbar;
  statistics.class_weight = operands.class_weight(block.columns.begin);
  if (keep) statistics.kept = kept(in_chunk, block.columns.begin);
  row_statistics(statistics, call.stream);
}

template <class T>
void Components<T>::make_gradients(RowRange chunk, bool from_kept) {
  const Wanted& wanted = call.p.wanted;
  sweep_gradients(
      *this, chunk,
      [&](const Block& block, Which which) {
        const BlockGradient g = from_kept ? from_kept_logits(block) : from_product(block);
        if (wanted.dbias.wanted && which.dc) sums.add_dbias(block, g);
        if (wanted.de.wanted && which.de) sums.add_de(block, g);
        if (wanted.dc.wanted && which.dc) sums.add_dc(block, g);
      },
      [&] {
        operands.leave_de();
        sums.begin_last_columns();
      });
}

template <class T>
BlockGradient Components<T>::place_of_g(const Block& block) const {
  if (call.d.g_in_kept) {
    const Kept<T> place = kept(block.rows.begin - block.chunk.begin, block.columns.begin);
    return {place.data, place.stride, coefficients.scalars()};
  }
  return {call.buffer<void>(buffer::kG), sums.g_stride(), coefficients.scalars()};
}

template <class T>
SlabGradient<T> Components<T>::slab_gradient(const Block& block, const BlockGradient& g) {
  SlabGradient<T> gradient;
  gradient.gradients = coefficients.from(block.chunk, block.rows.begin);
  gradient.class_weight = operands.class_weight(block.columns.begin);
  gradient.g = g.data;
  gradient.g_stride = g.stride;
  gradient.g_type = call.d.operand;
  return gradient;
}

template <class T>
BlockGradient Components<T>::from_kept_logits(const Block& block) {
  const BlockGradient g = place_of_g(block);
  SlabGradient<T> gradient = slab_gradient(block, g);
  const Kept<T> place = kept(block.rows.begin - block.chunk.begin, block.columns.begin);
  gradient.block = logit_block(place.exponentials ? nullptr : static_cast<T*>(place.data),
                               place.stride, block.rows, block.columns);
  gradient.transformed = !call.p.transform.softcap;  // with a softcap products are kept
  if (place.exponentials) {
    row_gradient_from_exponentials(gradient, place, call.d.sizes.slab, call.stream);
  } else {
    row_gradient(gradient, call.stream);
  }
  return g;
}

// The logits are made in blocks of the sizes that the decision has for backward, several to a block
// of g.
template <class T>
BlockGradient Components<T>::from_product(const Block& block) {
  const BlockGradient g = place_of_g(block);
  SlabGradient<T> gradient = slab_gradient(block, g);
  const DType operand = call.d.operand;
  const Sizes& s = call.d.sizes;
  T* z = call.buffer<T>(buffer::kZ);
  const std::int64_t z_stride = padded(s.slab, call.d.stat);
  const std::int64_t end = block.columns.begin + block.columns.count;
  for (std::int64_t v = block.columns.begin; v < end; v += s.slab) {
    const Columns slab{v, std::min(s.slab, end - v)};
    const Matrix c = operands.c(slab);
    for (std::int64_t r = 0; r < block.rows.count; r += s.block_rows) {
      const RowRange some{block.rows.begin + r, std::min(s.block_rows, block.rows.count - r)};
      Matrix e = operands.e(block.rows, block.chunk);
      e.data = at(e.data, operand, r * e.stride);
      products.multiply_logits(e, c, some.count, slab.count, z, z_stride);
      gradient.block = logit_block(z, z_stride, some, slab);
      gradient.gradients = coefficients.from(block.chunk, some.begin);
      gradient.class_weight = operands.class_weight(v);
      gradient.g = at(g.data, operand, r * g.stride + (v - block.columns.begin));
      row_gradient(gradient, call.stream);
    }
  }
  return g;
}

template <class T>
LogitBlock<T> Components<T>::logit_block(T* z, std::int64_t stride, RowRange block_rows,
                                         Columns columns) const {
  LogitBlock<T> block;
  block.z = z;
  block.stride = stride;
  block.rows = static_cast<int>(block_rows.count);
  block.columns = static_cast<int>(columns.count);
  block.table = rows.table();
  block.first_entry = block_rows.begin;
  block.first_column = static_cast<int>(columns.begin);
  block.bias = operands.bias(columns.begin);
  block.softcap = operands.softcap();
  return block;
}

template <class T>
Kept<T> Components<T>::kept(std::int64_t row_in_chunk, std::int64_t column) const {
  const CudaDecision& d = call.d;
  Kept<T> out;
  out.type = d.kept_type;
  out.exponentials = d.keeps_exponentials;
  out.stride = padded(call.head.classes.count, out.type);
  out.data = at(call.kept<void>(buffer::kKept), out.type, row_in_chunk * out.stride + column);
  if (out.exponentials) {
    out.maxima_stride = pieces(d);
    out.maxima = call.kept<T>(buffer::kMaxima) + row_in_chunk * out.maxima_stride +
                 column / d.sizes.slab * pieces_per_slab(d);
  }
  return out;
}

template struct Components<float>;
template struct Components<double>;

}  // namespace cutloss::cuda::library
