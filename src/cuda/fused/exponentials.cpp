// By rows with reference exponents (docs/math.md): what the logits' kernel stores of a chunk is
// x = e^(z - reference) times the softcap's slope. g is x times a factor of the row, known after
// the statistics, and the factor goes into the other operand of each product; only the target,
// which x leaves out, is added apart. Three products.
//
// The algorithm `stored` does the same with every row in one chunk, and what is kept waits for
// backward.
#include "cuda/fused/components.h"
#include "cuda/fused/engine.h"
#include "cuda/fused/targets.h"

namespace cutloss::cuda::fused {
namespace {

Columns all_columns(const Components& parts) { return {0, parts.call.head.classes.count}; }
void* x_of(const Components& parts) { return parts.call.kept<void>(buffer::kX); }
std::int64_t x_stride(const Components& parts) {
  return padded(parts.call.head.classes.count, DType::bf16);
}
float* target_sums(const Components& parts) {
  return parts.call.buffer<float>(buffer::kTargetSums);
}

// Where target logits and reference exponents lie: with x where that is kept, or in the workspace.
float* row_buffer(const Components& parts, std::string_view name) {
  const Call& call = parts.call;
  return call.d.algorithm->way.keeps_logits ? call.kept<float>(name) : call.buffer<float>(name);
}

// Makes x of a chunk, and its statistics.
void make_exponentials(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  Logits l = parts.logits(chunk, all_columns(parts), parts.operands.e(chunk, chunk),
                          /*by_position=*/false);
  References r;
  r.list = parts.listed(chunk);
  r.e = l.e;
  r.c = l.c;
  r.depth = l.depth;
  r.columns = l.columns;
  r.transform = l.transform;
  r.target_logit = row_buffer(parts, buffer::kTargetLogit);
  r.reference = row_buffer(parts, buffer::kReference);
  r.redo = call.buffer<int>(buffer::kRedo);
  launch_references(r, call.stream);

  const Grid grid = logits_grid(parts.d, chunk.count);
  const Exponentials out{x_of(parts), x_stride(parts), r.reference,
                         call.buffer<float2>(buffer::kSums)};
  Close close;
  close.list = r.list;
  close.sum_and_max = out.sum_and_max;
  close.column_tiles =
      static_cast<int>(divide_up(call.head.classes.count, parts.d.kernels->tile_columns));
  close.target_logit = r.target_logit;
  close.transform = r.transform;
  close.reference = r.reference;
  close.classes = call.head.classes;
  close.out = parts.rows.wanted_outputs();
  close.redo = r.redo;
  parts.d.kernels->exponentials(l, out, grid, call.stream);
  launch_close(close, call.stream);
  // Both are launched once more. They do something only where a row's reference was too far off,
  // which the device decides.
  l.only_if = r.redo;
  close.again = true;
  parts.d.kernels->exponentials(l, out, grid, call.stream);
  launch_close(close, call.stream);
}

void make_factors(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  FactorInputs k;
  k.list = parts.listed(chunk);
  k.rows = call.args.rows;
  k.upstream = call.args.upstream;
  k.inv_temperature = parts.inv_temperature(chunk.begin);
  k.softcap = parts.operands.softcap();
  k.scale = static_cast<float>(call.p.transform.logit_scale);
  launch_row_factors(
      k,
      {row_buffer(parts, buffer::kReference), row_buffer(parts, buffer::kTargetLogit),
       call.buffer<float>(buffer::kFactor), call.buffer<float>(buffer::kTargetG)},
      call.stream);
}

void scale_e(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  launch_scaled_rows(parts.listed(chunk), parts.operands.e(chunk, chunk),
                     call.buffer<float>(buffer::kFactor), static_cast<int>(call.head.D),
                     call.buffer<void>(buffer::kScaledE), e_stride(call.p, parts.d.operand),
                     call.stream);
}

// Makes the targets' part of dbias, and that of dC, which the product of dC adds.
void sum_targets(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  const Wanted& wanted = call.p.wanted;
  TargetSums t;
  t.list = parts.listed(chunk);
  t.target_g = call.buffer<float>(buffer::kTargetG);
  t.V = static_cast<int>(call.head.classes.count);
  t.order = call.buffer<int>(buffer::kTargetOrder);
  t.capacity = static_cast<int>(parts.d.sizes.chunk_rows);
  t.sort = call.buffer<void>(buffer::kTargetSort);
  t.sort_bytes = call.workspace.bytes_of(buffer::kTargetSort);
  if (wanted.dc.wanted) {
    t.e = parts.operands.e(chunk, chunk);
    t.depth = static_cast<int>(call.head.D);
    t.sums = target_sums(parts);
    t.sum_of_column = call.buffer<int>(buffer::kSumOfColumn);
  }
  if (wanted.dbias.wanted) {
    t.dbias = call.buffer<double>(buffer::kDbiasSums);
    t.inverse_scale = 1.0 / call.p.transform.logit_scale;
  }
  launch_target_sums(t, call.stream);
}

void add_dbias(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  launch_add_dbias(parts.listed(chunk), x_of(parts), x_stride(parts),
                   call.buffer<float>(buffer::kFactor), 1.0 / call.p.transform.logit_scale,
                   static_cast<int>(call.head.classes.count),
                   call.buffer<double>(buffer::kDbiasSums), chunk.begin == 0, call.stream);
  if (!call.p.wanted.dc.wanted) sum_targets(parts, chunk);
}

void add_dc(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  const Head& head = call.head;
  const std::int64_t V = head.classes.count;
  const bool has_sums = parts.sums.dc_has_sums();
  sum_targets(parts, chunk);
  DcProduct product;
  product.g = {x_of(parts), x_stride(parts)};
  product.e = {call.buffer<void>(buffer::kScaledE), e_stride(call.p, parts.d.operand)};
  product.sum_of_column = call.buffer<int>(buffer::kSumOfColumn);
  product.sums = target_sums(parts);
  product.dc_type = has_sums ? DType::f32 : call.d.dc_type;
  product.dc = has_sums ? parts.sums.dc_sums(all_columns(parts)) : call.args.gradients.dc;
  product.rows = static_cast<int>(chunk.count);
  product.V = static_cast<int>(V);
  product.D = static_cast<int>(head.D);
  product.count = parts.rows.table().count;
  product.first = static_cast<int>(chunk.begin);
  product.add = chunk.begin > 0 || call.p.wanted.dc.add;
  parts.d.kernels->dc(product, logits_grid(parts.d, chunk.count), call.stream);
  if (product.add) return;
  launch_clear_if_none(product.count, product.dc, V * head.D * size_of(product.dc_type),
                       call.stream);
}

void make_de(Components& parts, RowRange chunk) {
  const Call& call = parts.call;
  const Head& head = call.head;
  const Matrix c = parts.operands.c(all_columns(parts));
  Product product{};
  product.M = chunk.count;
  product.N = head.D;
  product.K = head.classes.count;
  product.a = {x_of(parts), x_stride(parts), false};
  product.b = {c.data, c.stride, false};
  product.c = call.buffer<float>(buffer::kDeSums);
  product.c_stride = head.D;
  product.c_type = DType::f32;
  parts.products.multiply(product);
  StoreDe store;
  store.list = parts.listed(chunk);
  store.sums = call.buffer<float>(buffer::kDeSums);
  store.factor = call.buffer<float>(buffer::kFactor);
  store.target_g = call.buffer<float>(buffer::kTargetG);
  store.c = c;
  store.depth = static_cast<int>(head.D);
  store.de = call.args.gradients.de;
  store.de_type = call.d.de_type;
  launch_store_de(store, call.stream);
}

struct Steps {
  static void statistics(Components& parts, RowRange chunk, Pass) {
    make_exponentials(parts, chunk);
  }

  // The order matters: dE's product may work in dC's memory, and the targets' sums lie where those
  // of dE were. Where E lies in dE, dE comes last.
  static void gradients(Components& parts, RowRange chunk, Pass pass) {
    if (pass == Pass::both) parts.operands.e_is_packed(chunk);
    const Wanted& wanted = parts.call.p.wanted;
    const bool de_is_last = parts.call.reads.e_in_de;
    make_factors(parts, chunk);
    if (wanted.de.wanted && !de_is_last) make_de(parts, chunk);
    if (wanted.dc.wanted) scale_e(parts, chunk);
    if (wanted.dbias.wanted) add_dbias(parts, chunk);
    if (wanted.dc.wanted) add_dc(parts, chunk);
    const bool last_chunk = chunk.begin + chunk.count == parts.rows.to_cover();
    if (last_chunk) parts.sums.store_columns(all_columns(parts));
    if (wanted.de.wanted && de_is_last) make_de(parts, chunk);
  }
};

}  // namespace

constinit const Algorithm exponentials{
    "cuda/fused/exponentials", {Schedule::rows, false}, by_rows_refusal, decide, open_steps<Steps>};
constinit const Algorithm stored{
    "cuda/fused/stored", {Schedule::rows, true}, by_rows_refusal, decide, open_steps<Steps>};

}  // namespace cutloss::cuda::fused
