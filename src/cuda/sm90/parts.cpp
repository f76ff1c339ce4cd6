#include "cuda/sm90/parts.h"

#include <algorithm>

#include "core/text.h"
#include "cuda/device.h"
#include "cuda/sm90/targets.h"

namespace cutloss::sm90 {

namespace all = cuda::use;
using cuda::at;

namespace {

Matrix kernel_matrix(const cuda::Matrix& m) { return {m.data, m.stride}; }

// The copy engine reads rows in units of 16 bytes.
void need_alignment(const void* data, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16 == 0) return;
  throw Error(ErrorCode::invalid_value,
              text(what,
                   " must start at a multiple of 16 bytes for engine cuda/fused_sm90, got "
                   "address ",
                   data, "; copy it, or set the problem's engine to cuda/library"));
}

}  // namespace

FusedParts::FusedParts(const Plan& plan, const Args& args, Passes passes, Memory memory,
                       Shape shape)
    : CudaParts<float>(plan, args, passes, std::move(memory)), shape_(shape) {
  if (p_.e_type == operand_ && row_count(p_) > 0) need_alignment(args.in.e, "in.e");
  if (p_.c_type == operand_) need_alignment(args.in.c, "in.c");
  if (passes.backward) {
    need_alignment(args.gradients.de, "gradients.de");
    need_alignment(args.gradients.dc, "gradients.dc");
  }
}

// --- rows -------------------------------------------------------------------------------------

cuda::RowFacts FusedParts::compact_facts() const {
  cuda::RowFacts facts = row_facts();
  facts.compact = true;  // kernels find rows by their positions
  return facts;
}

void FusedParts::list_rows() {
  if (row_count(p_) > 0) cuda::list_rows<float>(compact_facts(), table_, stream_);
  load_bias();
  if (p_.c_type != operand_ && shape_.c_columns >= p_.V) convert_columns({0, p_.V});
}

void FusedParts::clear_ignored_outputs() {
  if (row_count(p_) == 0) return;
  cuda::clear_ignored<float>(compact_facts(), table_, wanted_outputs(), stream_);
}

Listed FusedParts::listed(Rows rows) const {
  return {table_.count,
          table_.mismatch,
          table_.row,
          table_.position,
          table_.target,
          static_cast<int>(rows.begin),
          static_cast<int>(rows.count)};
}

const float* FusedParts::inv_temperature(std::int64_t entry) const {
  return static_cast<const float*>(table_.inv_temperature) + entry;
}

LogitTransform FusedParts::transform(std::int64_t column, std::int64_t entry) const {
  LogitTransform f;
  f.bias = bias(column);
  f.inv_temperature = inv_temperature(entry);
  f.scale = static_cast<float>(p_.logit_scale);
  f.softcap = softcap();
  f.inv_softcap = p_.softcap ? static_cast<float>(1.0 / *p_.softcap) : 0.f;
  return f;
}

Logits FusedParts::logits(Rows rows, Columns columns, const cuda::Matrix& e, bool by_position) {
  Logits l;
  l.type = operand_;
  l.e = kernel_matrix(e);
  if (by_position) {
    l.positions = table_.position;
    l.e_rows = p_.sequences * p_.length;
  }
  l.c = kernel_matrix(load_columns(columns));
  l.rows = static_cast<int>(rows.count);
  l.columns = static_cast<int>(columns.count);
  l.depth = static_cast<int>(p_.D);
  l.count = table_.count;
  l.first = static_cast<int>(rows.begin);
  l.transform = transform(columns.begin, rows.begin);
  l.target = table_.target + rows.begin;
  l.origin = static_cast<int>(columns.begin);
  return l;
}

// E of all rows that count, for forward alone.
cuda::Matrix FusedParts::packed_e(Rows chunk) {
  void* packed = buffer<void>(all::kE);
  const std::int64_t stride = cuda::e_stride(p_, operand_);
  if (loaded_rows_.count != chunk.count) {
    const cuda::RowCopy copy{args_.in.e, p_.e_type, p_.e_row_stride, packed,
                             operand_,   stride,    chunk.count,     p_.D};
    cuda::gather_rows(copy, places(chunk.begin), stream_);
    loaded_rows_ = chunk;
  }
  return {packed, stride};
}

float* FusedParts::row_buffer(std::string_view name) const {
  if (memory_.kept.has(name)) {
    return reinterpret_cast<float*>(static_cast<std::byte*>(args_.kept) +
                                    memory_.kept.offset(name));
  }
  return buffer<float>(name);
}

void* FusedParts::x() const {
  return static_cast<std::byte*>(args_.kept) + memory_.kept.offset(use::kX);
}

std::int64_t FusedParts::x_stride() const { return cuda::padded(p_.V, DType::bf16); }

float2* FusedParts::sums() const {
  float2* own = buffer<float2>(use::kSums);
  return own != nullptr ? own : buffer<float2>(all::kDeSums);
}

// --- forward ----------------------------------------------------------------------------------

void FusedParts::begin_statistics(Rows) {}

void FusedParts::accumulate_statistics(const Block& block, bool keep) {
  // By rows there is room for exponentials, and for nothing else: also where forward is all that is
  // asked of such a plan.
  if (keep || by_rows()) {
    make_exponentials(block.chunk);
    return;
  }
  const Rows rows = block.rows;
  const Columns columns = block.columns;
  const bool by_position = !shape_.packs_e_in_forward;
  const cuda::Matrix e =
      by_position ? cuda::Matrix{args_.in.e, p_.e_row_stride} : packed_e(block.chunk);
  const Grid grid = statistics_grid(plan_);
  Statistics s;
  s.all = p_.wants_entropy || p_.wants_zbar || p_.wants_argmax;
  s.partials = {buffer<float2>(use::kPartials), nullptr, nullptr, grid.block_rows(), grid.slots()};
  if (s.all) {
    s.partials.weighted_and_zbar = buffer<float2>(use::kPartialsMore);
    s.partials.weight_and_argmax = buffer<float2>(use::kPartialsArgmax);
  }
  const std::int64_t in_chunk = rows.begin - block.chunk.begin;
  s.target_logit = buffer<float>(use::kTargetLogit) + in_chunk;
  s.class_weight = class_weight(columns.begin);
  const bool first = columns.begin == 0, last = columns.begin + columns.count == p_.V;
  launch_clear_statistics(s.partials, partial_entries(grid, static_cast<int>(plan_.block_rows)),
                          s.target_logit, first ? static_cast<int>(rows.count) : 0, stream_);
  launch_statistics(logits(rows, columns, e, by_position), s, grid, stream_);
  Merge merge;
  merge.list = listed(rows);
  merge.partials = s.partials;
  merge.clusters = grid.clusters();
  merge.largest_group = grid.largest_group;
  merge.all = s.all;
  merge.first_slab = first;
  merge.last_slab = last;
  auto* states = buffer<RowState<float>>(all::kStates);
  merge.states = states == nullptr ? nullptr : states + in_chunk;
  merge.target_logit = s.target_logit;
  merge.class_weight = class_weight(0);
  merge.V = static_cast<int>(p_.V);
  merge.out = wanted_outputs();
  launch_merge(merge, stream_);
}

void FusedParts::finish_statistics(Rows) {
  // Done by the merge after the last slab.
}

void FusedParts::make_exponentials(Rows chunk) {
  const Columns columns{0, p_.V};
  Logits l = logits(chunk, columns, load_rows(chunk, chunk), /*by_position=*/false);
  References r;
  r.list = listed(chunk);
  r.e = l.e;
  r.c = l.c;
  r.depth = l.depth;
  r.transform = l.transform;
  r.target_logit = row_buffer(use::kTargetLogit);
  r.reference = row_buffer(use::kReference);
  r.redo = buffer<int>(use::kRedo);
  launch_references(r, stream_);

  const Grid grid = logits_grid(chunk.count);
  const Exponentials out{x(), x_stride(), r.reference, sums()};
  Close close;
  close.list = r.list;
  close.sum_and_max = out.sum_and_max;
  close.column_tiles = column_tiles(p_.V);
  close.target_logit = r.target_logit;
  close.transform = r.transform;
  close.reference = r.reference;
  close.V = static_cast<int>(p_.V);
  close.out = wanted_outputs();
  close.redo = r.redo;
  launch_exponentials(l, out, grid, stream_);
  launch_close(close, stream_);
  // Once more, where a row's reference was too far off: decided on the device.
  l.only_if = r.redo;
  close.again = true;
  launch_exponentials(l, out, grid, stream_);
  launch_close(close, stream_);
}

// --- backward ---------------------------------------------------------------------------------

void FusedParts::make_g(const Block& block, bool from_kept) {
  if (!from_kept) {
    make_g_block(block);
    return;
  }
  // x is g but for a factor of the row, which goes into the other operands.
  g_ = x();
  g_stride_ = x_stride();
  if (!plan_.keeps_logits) loaded_rows_ = block.chunk;
  Coefficients k;
  k.list = listed(block.chunk);
  k.rows = args_.rows;
  k.upstream = args_.upstream;
  k.inv_temperature = inv_temperature(block.chunk.begin);
  k.softcap = softcap();
  k.scale = static_cast<float>(p_.logit_scale);
  auto* factor = buffer<float>(use::kFactor);
  launch_row_factors(k,
                     {row_buffer(use::kReference), row_buffer(use::kTargetLogit), factor,
                      buffer<float>(use::kTargetG)},
                     stream_);
  if (!p_.needs_dc) return;
  launch_scaled_rows(k.list, kernel_matrix(load_rows(block.chunk, block.chunk)), factor,
                     static_cast<int>(p_.D), buffer<void>(use::kScaledE),
                     cuda::e_stride(p_, operand_), stream_);
}

void FusedParts::make_g_block(const Block& block) {
  g_ = buffer<void>(all::kG);
  g_stride_ = cuda::padded(plan_.gradient_slab, operand_);
  const std::int64_t end = block.columns.begin + block.columns.count;
  const Grid grid = logits_grid(block.rows.count);
  for (std::int64_t v = block.columns.begin; v < end; v += most_columns()) {
    const Columns columns{v, std::min(most_columns(), end - v)};
    GradientOfLogits out;
    out.g = at(g_, operand_, v - block.columns.begin);
    out.g_stride = g_stride_;
    out.row = coefficients(block.chunk, block.rows.begin);
    out.class_weight = class_weight(v);
    out.general = args_.upstream.d_entropy != nullptr || args_.upstream.d_zbar != nullptr;
    const cuda::Matrix e = load_rows(block.rows, block.chunk);
    launch_gradient(logits(block.rows, columns, e, /*by_position=*/false), out, grid, stream_);
  }
  launch_clear_rest(listed(block.rows), g_, g_stride_, static_cast<int>(block.columns.count),
                    grid.block_rows(), stream_);
}

void FusedParts::accumulate_dbias(const Block& block) {
  if (!by_rows()) {
    CudaParts<float>::accumulate_dbias(block);
    return;
  }
  launch_add_dbias(listed(block.chunk), x(), x_stride(), buffer<float>(use::kFactor),
                   1.0 / p_.logit_scale, static_cast<int>(p_.V), buffer<double>(all::kDbiasSums),
                   block.chunk.begin == 0, stream_);
  if (!p_.needs_dc) sum_targets(block.chunk);
}

// The targets' part of dbias, and of dC what launch_dc will add.
void FusedParts::sum_targets(Rows chunk) {
  TargetSums t;
  t.list = listed(chunk);
  t.target_g = buffer<float>(use::kTargetG);
  t.V = static_cast<int>(p_.V);
  t.order = buffer<int>(use::kTargetOrder);
  t.capacity = static_cast<int>(plan_.chunk_rows);
  t.sort = buffer<void>(use::kTargetSort);
  t.sort_bytes = memory_.workspace.bytes_of(use::kTargetSort);
  if (p_.needs_dc) {
    t.e = kernel_matrix(load_rows(chunk, chunk));
    t.depth = static_cast<int>(p_.D);
    t.sums = target_sums();
    t.sum_of_column = buffer<int>(use::kSumOfColumn);
  }
  if (p_.needs_dbias) {
    t.dbias = buffer<double>(all::kDbiasSums);
    t.inverse_scale = 1.0 / p_.logit_scale;
  }
  launch_target_sums(t, stream_);
}

// Where dE's sums will be.
float* FusedParts::target_sums() const {
  return buffer<float>(p_.needs_de ? all::kDeSums : use::kTargetSums);
}

void FusedParts::accumulate_de(const Block& block) {
  // By rows dE is made when it is stored: after dC, whose targets' sums lie where its sums will.
  if (!by_rows()) CudaParts<float>::accumulate_de(block);
}

void FusedParts::accumulate_dc(const Block& block) {
  if (!by_rows() && operand_ != DType::bf16) {
    CudaParts<float>::accumulate_dc(block);
    return;
  }
  const Rows rows = block.rows;
  const Columns columns = block.columns;
  float* sums = buffer<float>(all::kDcSums);
  DcProduct product;
  product.g = {g_, g_stride_};
  if (by_rows()) {
    product.e = {buffer<void>(use::kScaledE), cuda::e_stride(p_, operand_)};
    sum_targets(block.chunk);
    product.sum_of_column = buffer<int>(use::kSumOfColumn);
    product.sums = target_sums();
  } else {
    product.e = kernel_matrix(load_rows(rows, block.chunk));
    product.scale = static_cast<float>(p_.logit_scale);
  }
  product.dc_type = sums == nullptr ? p_.c_type : DType::f32;
  product.dc =
      sums == nullptr ? at(args_.gradients.dc, p_.c_type, columns.begin * p_.D) : dc_sums(columns);
  product.rows = static_cast<int>(rows.count);
  product.V = static_cast<int>(columns.count);
  product.D = static_cast<int>(p_.D);
  product.count = table_.count;
  product.first = static_cast<int>(rows.begin);
  product.add = rows.begin > 0;
  launch_dc(product, logits_grid(rows.count), stream_);
  if (!product.add) {
    launch_clear_if_none(table_.count, product.dc, columns.count * p_.D * size_of(product.dc_type),
                         stream_);
  }
}

void FusedParts::store_de(Rows chunk) {
  if (!by_rows()) {
    CudaParts<float>::store_de(chunk);
    return;
  }
  const cuda::Matrix c = load_columns({0, p_.V});
  cuda::Product product{};
  product.M = chunk.count;
  product.N = p_.D;
  product.K = p_.V;
  product.a = {x(), x_stride(), false};
  product.b = {c.data, c.stride, false};
  product.c = buffer<float>(all::kDeSums);
  product.c_stride = p_.D;
  product.c_type = DType::f32;
  multiply(product);
  StoreDe store;
  store.list = listed(chunk);
  store.sums = buffer<float>(all::kDeSums);
  store.factor = buffer<float>(use::kFactor);
  store.target_g = buffer<float>(use::kTargetG);
  store.c = kernel_matrix(c);
  store.depth = static_cast<int>(p_.D);
  store.de = args_.gradients.de;
  store.de_type = p_.e_type;
  launch_store_de(store, stream_);
}

}  // namespace cutloss::sm90
