// Forward keeps nothing but the statistics. Backward makes the logits once more, a slab of columns
// at a time, and g of them in the registers of the same kernel. dE's product is our own where slabs
// are narrow and the operands bf16, else cuBLASLt's; dC's is our own for bf16. Four products.
#include <algorithm>

#include "cuda/fused/engine.h"
#include "cuda/fused/statistics.h"

namespace cutloss::cuda::fused {
namespace {

BlockGradient make_g(Components& parts, const Block& block) {
  const Call& call = parts.call;
  const BlockGradient g{call.buffer<void>(buffer::kG), parts.sums.g_stride(),
                        parts.coefficients.scalars()};
  const std::int64_t most = parts.operands.most_columns();
  const std::int64_t end = block.columns.begin + block.columns.count;
  const Grid grid = logits_grid(parts.d, block.rows.count);
  for (std::int64_t v = block.columns.begin; v < end; v += most) {
    const Columns columns{v, std::min(most, end - v)};
    GradientOfLogits out;
    out.g = at(g.data, parts.d.operand, v - block.columns.begin);
    out.g_stride = g.stride;
    out.row = parts.coefficients.from(block.chunk, block.rows.begin);
    out.class_weight = parts.operands.class_weight(v);
    out.general = call.args.upstream.d_entropy != nullptr || call.args.upstream.d_zbar != nullptr;
    const Matrix e = parts.e(block);
    parts.d.kernels->gradient(parts.logits(block.rows, columns, e, parts.finds_e), out, grid,
                              call.stream);
  }
  // The matrix library and the sums of columns read all rows; our own products skip those that do
  // not count.
  if (parts.d.makes_de_itself && !call.p.wanted.dbias.wanted) return g;
  launch_clear_rest(parts.listed(block.rows), g.data, g.stride,
                    static_cast<int>(block.columns.count), grid.block_rows(), call.stream);
  return g;
}

DcProduct dc_product(Components& parts, const Block& block, const BlockGradient& g) {
  const Call& call = parts.call;
  const Head& head = call.head;
  const bool has_sums = parts.sums.dc_has_sums();
  const Columns columns = block.columns;
  DcProduct product;
  product.g = {g.data, g.stride};
  product.e = parts.e(block);
  if (parts.finds_e) {
    product.positions = parts.rows.table().position;
    product.e_rows = parts.positions();
  }
  product.scale = static_cast<float>(call.p.transform.logit_scale);
  product.dc_type = has_sums ? DType::f32 : call.d.dc_type;
  product.dc = has_sums ? parts.sums.dc_sums(columns) : call.dc(columns.begin);
  product.rows = static_cast<int>(block.rows.count);
  product.V = static_cast<int>(columns.count);
  product.D = static_cast<int>(head.D);
  product.count = parts.rows.table().count;
  product.first = static_cast<int>(block.rows.begin);
  product.add = parts.sums.adds_to_dc(block);
  return product;
}

// dE's product of some of a block's columns.
DeProduct de_product(Components& parts, const Block& block, const BlockGradient& g,
                     Columns columns) {
  const Call& call = parts.call;
  DeProduct product;
  product.g = {at(g.data, DType::bf16, columns.begin - block.columns.begin), g.stride};
  product.c = parts.operands.c(columns);
  product.sums =
      parts.call.de_sums<float>(block.chunk) + (block.rows.begin - block.chunk.begin) * call.head.D;
  product.rows = static_cast<int>(block.rows.count);
  product.columns = static_cast<int>(columns.count);
  product.D = static_cast<int>(call.head.D);
  product.count = parts.rows.table().count;
  product.first = static_cast<int>(block.rows.begin);
  product.add = columns.begin > 0;
  product.scale = static_cast<float>(call.p.transform.logit_scale);
  return product;
}

void add_dc(Components& parts, const Block& block, const BlockGradient& g) {
  if (parts.d.operand != DType::bf16) {
    parts.sums.add_dc(block, g);
    return;
  }
  parts.d.kernels->dc(dc_product(parts, block, g), logits_grid(parts.d, block.rows.count),
                      parts.call.stream);
}

void add_de(Components& parts, const Block& block, const BlockGradient& g) {
  if (!parts.d.makes_de_itself) {
    parts.sums.add_de(block, g);
    return;
  }
  const std::int64_t most = parts.operands.most_columns();
  const std::int64_t end = block.columns.begin + block.columns.count;
  for (std::int64_t v = block.columns.begin; v < end; v += most) {
    parts.d.kernels->de(de_product(parts, block, g, {v, std::min(most, end - v)}),
                        logits_grid(parts.d, block.rows.count), parts.call.stream);
  }
}

void add_dc_and_de(Components& parts, const Block& block, const BlockGradient& g) {
  if (!parts.d.makes_de_itself || block.columns.count > parts.operands.most_columns()) {
    add_de(parts, block, g);
    add_dc(parts, block, g);
    return;
  }
  parts.d.kernels->dc_and_de(dc_product(parts, block, g),
                             de_product(parts, block, g, block.columns),
                             logits_grid(parts.d, block.rows.count), parts.call.stream);
}

struct Steps {
  static void statistics(Components& parts, RowRange chunk, Pass) { make_statistics(parts, chunk); }
  static void gradients(Components& parts, RowRange chunk, Pass) {
    const Wanted& wanted = parts.call.p.wanted;
    const bool last_chunk = chunk.begin + chunk.count == parts.rows.to_cover();
    sweep_gradients(
        parts, chunk,
        [&](const Block& block, Which which) {
          const BlockGradient g = make_g(parts, block);
          if (wanted.dbias.wanted && which.dc) parts.sums.add_dbias(block, g);
          const bool de = wanted.de.wanted && which.de, dc = wanted.dc.wanted && which.dc;
          if (de && dc) {
            add_dc_and_de(parts, block, g);
          } else if (de) {
            add_de(parts, block, g);
          } else if (dc) {
            add_dc(parts, block, g);
          }
        },
        [&] {
          parts.finds_e = parts.d.finds_last_e && parts.call.reads.e_in_de;
          parts.operands.leave_de();
          parts.sums.begin_last_columns();
        });
    if (!last_chunk || !wanted.dc.wanted || wanted.dc.add) return;
    // Our own product leaves dC as it is where no row counts at all, so it is cleared here.
    const Call& call = parts.call;
    launch_clear_if_none(parts.rows.table().count, call.args.gradients.dc,
                         call.head.classes.count * call.head.D * size_of(call.d.dc_type),
                         call.stream);
  }
};

}  // namespace

constinit const Algorithm by_vocabulary{
    "cuda/fused/by_vocabulary", {Schedule::vocabulary, false}, nullptr, decide, open_steps<Steps>};

}  // namespace cutloss::cuda::fused
