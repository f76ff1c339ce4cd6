#include "cuda/parts.h"

#include <algorithm>
#include <type_traits>

#include "core/validate.h"
#include "cuda/device.h"

namespace cutloss::cuda {
namespace {

// More does not make a product quicker.
constexpr std::int64_t kMostLibraryBytes = std::int64_t{32} << 20;

// Forward and backward in one call: what `statistics` of a chunk loaded, `gradients` finds.
bool in_one_call(const Plan& plan) { return plan.schedule == Schedule::rows && !plan.keeps_logits; }

}  // namespace

template <class T>
CudaParts<T>::CudaParts(const Plan& plan, const Args& args, Passes passes, Memory memory)
    : plan_(plan),
      p_(plan.problem),
      args_(args),
      passes_(passes),
      memory_(std::move(memory)),
      traits_(traits_of(plan.problem)),
      operand_(traits_.operand),
      stream_(static_cast<cudaStream_t>(args.stream)) {
  int* counts = buffer<int>(use::kCounts);
  table_ = {counts,
            counts + 1,
            buffer<std::int64_t>(use::kRows),
            buffer<int>(use::kPositions),
            buffer<int>(use::kTargets),
            buffer<void>(use::kInvTemperature)};
}

// --- rows -------------------------------------------------------------------------------------

template <class T>
RowFacts CudaParts<T>::row_facts() const {
  RowFacts facts;
  facts.targets = args_.in.targets;
  facts.target_type = p_.target_type;
  facts.ignore_index = p_.ignore_index;
  facts.rows = static_cast<int>(row_count(p_));
  facts.predicted = static_cast<int>(p_.length - p_.shift);
  facts.length = static_cast<int>(p_.length);
  facts.shift = static_cast<int>(p_.shift);
  facts.V = static_cast<int>(p_.V);
  facts.num_valid = p_.num_valid.value_or(-1);
  // Rows that are computed where they lie keep their places.
  facts.compact = p_.num_valid || !reads_e_in_place(plan_, traits_, passes_);
  facts.temperature = p_.has_row_temperature ? args_.in.temperature : nullptr;
  facts.temperature_scale = p_.temperature;
  const auto [least, most] = usable_range(traits_.stat);
  facts.least = least;
  facts.most = most;
  return facts;
}

template <class T>
void CudaParts<T>::list_rows() {
  if (row_count(p_) > 0) cuda::list_rows<T>(row_facts(), table_, stream_);
  load_bias();
  if (p_.c_type != operand_ && memory_.room.c_columns >= p_.V) convert_columns({0, p_.V});
}

template <class T>
std::int64_t CudaParts<T>::rows_to_cover() const {
  const std::int64_t rows = row_count(p_);
  return p_.num_valid ? std::clamp<std::int64_t>(*p_.num_valid, 0, rows) : rows;
}

template <class T>
RowList CudaParts<T>::list(Rows rows) const {
  return {table_.row + rows.begin, rows.count};
}

template <class T>
RowOutputs CudaParts<T>::wanted_outputs() const {
  RowOutputs out = args_.rows;
  if (!p_.wants_entropy) out.entropy = nullptr;
  if (!p_.wants_zbar) out.zbar = out.zbar_centred = nullptr;
  if (!p_.wants_argmax) out.argmax = nullptr;
  return out;
}

template <class T>
void CudaParts<T>::clear_ignored_outputs() {
  if (row_count(p_) == 0) return;
  clear_ignored<T>(row_facts(), table_, wanted_outputs(), stream_);
}

// --- operands ---------------------------------------------------------------------------------

template <class T>
Places CudaParts<T>::places(std::int64_t first) const {
  return {table_, first, static_cast<int>(p_.length), p_.e_sequence_stride, p_.e_row_stride};
}

template <class T>
void CudaParts<T>::copy_flat(const void* from, DType from_type, void* to, DType to_type,
                             std::int64_t count) const {
  constexpr std::int64_t kColumns = 1024;  // a block's worth
  const std::int64_t rows = count / kColumns;
  RowCopy copy{from, from_type, kColumns, to, to_type, kColumns, rows, kColumns};
  copy_rows(copy, stream_);
  const std::int64_t done = rows * kColumns;
  copy.from = at(from, from_type, done);
  copy.to = at(to, to_type, done);
  copy.rows = done < count ? 1 : 0;
  copy.columns = count - done;
  copy_rows(copy, stream_);
}

template <class T>
void CudaParts<T>::load_bias() {
  if (T* to = buffer<T>(use::kBias)) {
    copy_flat(args_.in.bias, p_.bias_type, to, traits_.stat, p_.V);
  }
}

template <class T>
const T* CudaParts<T>::bias(std::int64_t column) const {
  if (!p_.has_bias) return nullptr;
  const T* converted = buffer<T>(use::kBias);
  return (converted != nullptr ? converted : static_cast<const T*>(args_.in.bias)) + column;
}

template <class T>
const T* CudaParts<T>::class_weight(std::int64_t column) const {
  return p_.has_class_weight ? static_cast<const T*>(args_.in.class_weight) + column : nullptr;
}

template <class T>
Matrix CudaParts<T>::load_rows(Rows rows, Rows chunk) {
  if (reads_e_in_place(plan_, traits_, passes_)) {
    // Rows of E follow each other, those that predict nothing only at the end.
    return {at(args_.in.e, p_.e_type, rows.begin * p_.e_row_stride), p_.e_row_stride};
  }
  const bool in_de = packs_e_in_de(plan_, traits_, passes_);
  const bool whole = in_de || memory_.room.whole_e;
  const std::int64_t stride = in_de ? p_.D : e_stride(p_, operand_);
  void* packed = in_de ? args_.gradients.de : buffer<void>(use::kE);
  const Rows wanted = whole ? chunk : rows;
  if (loaded_rows_.begin != wanted.begin || loaded_rows_.count != wanted.count) {
    RowCopy copy{args_.in.e, p_.e_type, p_.e_row_stride, packed,
                 operand_,   stride,    wanted.count,    p_.D};
    gather_rows(copy, places(wanted.begin), stream_);
    loaded_rows_ = wanted;
  }
  return {at(packed, operand_, (rows.begin - wanted.begin) * stride), stride};
}

template <class T>
std::int64_t CudaParts<T>::most_columns() const {
  return p_.c_type == operand_ ? p_.V : memory_.room.c_columns;
}

template <class T>
void CudaParts<T>::convert_columns(Columns columns) {
  RowCopy copy{at(args_.in.c, p_.c_type, columns.begin * p_.c_row_stride),
               p_.c_type,
               p_.c_row_stride,
               buffer<void>(use::kC),
               operand_,
               e_stride(p_, operand_),
               columns.count,
               p_.D};
  copy_rows(copy, stream_);
}

template <class T>
Matrix CudaParts<T>::load_columns(Columns columns) {
  if (p_.c_type == operand_) {
    return {at(args_.in.c, p_.c_type, columns.begin * p_.c_row_stride), p_.c_row_stride};
  }
  const std::int64_t stride = e_stride(p_, operand_);
  if (memory_.room.c_columns >= p_.V) {
    return {at(buffer<void>(use::kC), operand_, columns.begin * stride), stride};
  }
  if (loaded_columns_.begin != columns.begin || loaded_columns_.count != columns.count) {
    convert_columns(columns);
    loaded_columns_ = columns;
  }
  return {buffer<void>(use::kC), stride};
}

template <class T>
void CudaParts<T>::multiply(Product product) const {
  product.type = operand_;
  product.tf32 = p_.allow_tf32;
  // cuBLASLt has what the buffers leave, from a multiple of its 256 bytes on.
  auto* begin = static_cast<std::byte*>(args_.workspace);
  std::int64_t used = memory_.workspace.bytes();
  used += (256 - reinterpret_cast<std::uintptr_t>(begin + used) % 256) % 256;
  const std::int64_t left = workspace_bytes(plan_, passes_) - used;
  product.workspace_bytes = std::clamp<std::int64_t>(left / 256 * 256, 0, kMostLibraryBytes);
  product.workspace = product.workspace_bytes == 0 ? nullptr : begin + used;
  cuda::multiply(product, stream_);
}

template <class T>
void CudaParts<T>::multiply_logits(const Matrix& e, const Matrix& c, std::int64_t rows,
                                   std::int64_t columns, T* z) const {
  Product product{};
  product.M = rows;
  product.N = columns;
  product.K = p_.D;
  product.a = {e.data, e.stride, false};
  product.b = {c.data, c.stride, true};
  product.c = z;
  product.c_stride = padded(plan_.slab, traits_.stat);
  product.c_type = traits_.stat;
  product.alpha = p_.logit_scale;
  multiply(product);
}

// --- forward ----------------------------------------------------------------------------------

template <class T>
LogitBlock<T> CudaParts<T>::logit_block(T* z, std::int64_t stride, Rows rows,
                                        Columns columns) const {
  LogitBlock<T> block;
  block.z = z;
  block.stride = stride;
  block.rows = static_cast<int>(rows.count);
  block.columns = static_cast<int>(columns.count);
  block.table = table_;
  block.first_entry = rows.begin;
  block.first_column = static_cast<int>(columns.begin);
  block.bias = bias(columns.begin);
  block.softcap = softcap();
  return block;
}

template <class T>
Kept<T> CudaParts<T>::kept(std::int64_t row_in_chunk, std::int64_t column) const {
  const Layout& layout = memory_.kept;
  auto* base = static_cast<std::byte*>(args_.kept);
  Kept<T> kept;
  kept.type = traits_.kept;
  kept.exponentials = traits_.keeps_exponentials;
  kept.stride = padded(p_.V, kept.type);
  kept.data = at(base + layout.offset(use::kKept), kept.type, row_in_chunk * kept.stride + column);
  if (kept.exponentials) {
    kept.maxima_stride = pieces(plan_);
    kept.maxima = reinterpret_cast<T*>(base + layout.offset(use::kMaxima)) +
                  row_in_chunk * kept.maxima_stride + column / plan_.slab * pieces_per_slab(plan_);
  }
  return kept;
}

template <class T>
void CudaParts<T>::begin_statistics(Rows) {
  // States begin at the first column; E and bias are loaded where they are needed.
}

template <class T>
void CudaParts<T>::accumulate_statistics(const Block& block, bool keep) {
  T* z = buffer<T>(use::kZ);
  multiply_logits(load_rows(block.rows, block.chunk), load_columns(block.columns), block.rows.count,
                  block.columns.count, z);
  const std::int64_t in_chunk = block.rows.begin - block.chunk.begin;
  StatisticsOf<T> what;
  what.block = logit_block(z, padded(plan_.slab, traits_.stat), block.rows, block.columns);
  what.states = buffer<RowState<T>>(use::kStates) + in_chunk;
  what.entropy = p_.wants_entropy;
  what.argmax = p_.wants_argmax;
  what.zbar = p_.wants_zbar;
  what.class_weight = class_weight(block.columns.begin);
  if (keep) what.kept = kept(in_chunk, block.columns.begin);
  row_statistics(what, stream_);
}

template <class T>
void CudaParts<T>::finish_statistics(Rows chunk) {
  finish_rows<T>(table_, chunk.begin, chunk.count, buffer<RowState<T>>(use::kStates),
                 class_weight(0), wanted_outputs(), p_.V, stream_);
}

// --- backward ---------------------------------------------------------------------------------

template <class T>
const RowGradient<T>* CudaParts<T>::coefficients(Rows chunk, std::int64_t row) {
  auto* made = buffer<RowGradient<T>>(use::kCoefficients);
  if (coefficients_of_.begin != chunk.begin || coefficients_of_.count != chunk.count) {
    Coefficients c;
    c.table = table_;
    c.first = chunk.begin;
    c.count = chunk.count;
    c.rows = args_.rows;
    c.upstream = args_.upstream;
    c.class_weight = class_weight(0);
    c.V = p_.V;
    auto* scalars = buffer<DeviceScalars>(use::kScalars);
    if (scalars != nullptr) make_scalars(c, p_.logit_scale, scalars, stream_);
    make_coefficients<T>(c, scalars, made, stream_);
    coefficients_of_ = chunk;
  }
  return made + (row - chunk.begin);
}

template <class T>
void CudaParts<T>::make_g(const Block& block, bool from_kept) {
  const std::int64_t in_chunk = block.rows.begin - block.chunk.begin;
  if (in_one_call(plan_) && memory_.room.whole_e) loaded_rows_ = block.chunk;
  GradientOf<T> what;
  what.gradients = coefficients(block.chunk, block.rows.begin);
  what.class_weight = class_weight(block.columns.begin);
  what.g_type = operand_;
  if (makes_g_in_place(plan_, traits_)) {
    const Kept<T> place = kept(in_chunk, block.columns.begin);
    g_ = place.data;
    g_stride_ = place.stride;
  } else {
    g_ = buffer<void>(use::kG);
    g_stride_ = padded(plan_.gradient_slab, operand_);
  }
  what.g = g_;
  what.g_stride = g_stride_;
  if (from_kept) {
    const Kept<T> place = kept(in_chunk, block.columns.begin);
    what.block = logit_block(place.exponentials ? nullptr : static_cast<T*>(place.data),
                             place.stride, block.rows, block.columns);
    what.transformed = !p_.softcap;  // with one the products are kept as they are
    place.exponentials ? row_gradient_from_exponentials(what, place, plan_.slab, stream_)
                       : row_gradient(what, stream_);
    return;
  }
  // Logits again, as many at a time as forward has.
  T* z = buffer<T>(use::kZ);
  const Rows rows = block.rows;
  const Columns columns = block.columns;
  const std::int64_t end = columns.begin + columns.count;
  for (std::int64_t v = columns.begin; v < end; v += plan_.slab) {
    const Columns slab{v, std::min(plan_.slab, end - v)};
    const Matrix c = load_columns(slab);
    for (std::int64_t r = 0; r < rows.count; r += plan_.block_rows) {
      const Rows some{rows.begin + r, std::min(plan_.block_rows, rows.count - r)};
      Matrix e = load_rows(rows, block.chunk);
      e.data = at(e.data, operand_, r * e.stride);
      multiply_logits(e, c, some.count, slab.count, z);
      what.block = logit_block(z, padded(plan_.slab, traits_.stat), some, slab);
      what.gradients = coefficients(block.chunk, some.begin);
      what.class_weight = class_weight(v);
      what.g = at(g_, operand_, r * g_stride_ + (v - columns.begin));
      row_gradient(what, stream_);
    }
  }
}

template <class T>
void CudaParts<T>::accumulate_dbias(const Block& block) {
  ColumnSums what;
  what.g = g_;
  what.stride = g_stride_;
  what.type = operand_;
  what.rows = block.rows.count;
  what.columns = block.columns.count;
  what.sums = buffer<double>(use::kDbiasSums) + block.columns.begin;
  what.accumulate = block.rows.begin > 0;
  what.scalars = buffer<DeviceScalars>(use::kScalars);
  column_sums(what, stream_);
}

template <class T>
void CudaParts<T>::set_gradient_scale(Product& product) const {
  product.alpha = p_.logit_scale;
  product.device_alpha = buffer<DeviceScalars>(use::kScalars);
}

template <class T>
void CudaParts<T>::accumulate_de(const Block& block) {
  const std::int64_t end = block.columns.begin + block.columns.count;
  for (std::int64_t v = block.columns.begin; v < end; v += most_columns()) {
    const Columns columns{v, std::min(most_columns(), end - v)};
    const Matrix c = load_columns(columns);
    Product product{};
    product.M = block.rows.count;
    product.N = p_.D;
    product.K = columns.count;
    product.a = {at(g_, operand_, v - block.columns.begin), g_stride_, false};
    product.b = {c.data, c.stride, false};
    product.c = de_sums(block.chunk) + (block.rows.begin - block.chunk.begin) * p_.D;
    product.c_stride = p_.D;
    product.c_type = traits_.stat;
    product.accumulate = v > 0;
    set_gradient_scale(product);
    multiply(product);
  }
}

template <class T>
void CudaParts<T>::accumulate_dc(const Block& block) {
  const Matrix e = load_rows(block.rows, block.chunk);
  const bool final = one_product_makes_dc(plan_, traits_);
  Product product{};
  product.M = block.columns.count;
  product.N = p_.D;
  product.K = block.rows.count;
  product.a = {g_, g_stride_, true};
  product.b = {e.data, e.stride, false};
  product.c = final ? at(args_.gradients.dc, p_.c_type, block.columns.begin * p_.D)
                    : dc_sums(block.columns);
  product.c_stride = p_.D;
  product.c_type = final ? p_.c_type : traits_.stat;
  product.accumulate = block.rows.begin > 0;
  set_gradient_scale(product);
  multiply(product);
}

template <class T>
void CudaParts<T>::store_dc(Columns columns) {
  if (buffer<T>(use::kDcSums) == nullptr) return;  // they are in the output
  copy_flat(dc_sums(columns), traits_.stat, at(args_.gradients.dc, p_.c_type, columns.begin * p_.D),
            p_.c_type, columns.count * p_.D);
}

template <class T>
void CudaParts<T>::store_de(Rows chunk) {
  if (accumulates_de_in_place(plan_, traits_)) return;
  RowCopy copy{de_sums(chunk), traits_.stat, p_.D,        args_.gradients.de,
               p_.e_type,      p_.D,         chunk.count, p_.D};
  scatter_rows(copy, places(chunk.begin), stream_);
}

template <class T>
void CudaParts<T>::finish_gradients() {
  const std::int64_t positions = p_.sequences * p_.length;
  const bool none = rows_to_cover() == 0;
  if (p_.needs_de && positions > 0) {
    clear_unpredicted(row_facts(), positions, args_.gradients.de, p_.e_type, p_.D, stream_);
  }
  if (p_.needs_dc && none) {
    check(cudaMemsetAsync(args_.gradients.dc, 0,
                          static_cast<std::size_t>(p_.V * p_.D * size_of(p_.c_type)), stream_),
          "zeros for dC");
  }
  if (p_.needs_dbias) {
    double* sums = buffer<double>(use::kDbiasSums);
    if (none) {
      check(cudaMemsetAsync(sums, 0, static_cast<std::size_t>(p_.V) * 8, stream_),
            "zeros for dbias");
    }
    copy_flat(sums, DType::f64, args_.gradients.dbias, p_.bias_type, p_.V);
  }
  if (!p_.num_valid || row_count(p_) == 0) return;
  if (p_.needs_de) {
    poison_where_wrong(table_, args_.gradients.de, p_.e_type, positions * p_.D, stream_);
  }
  if (p_.needs_dc) {
    poison_where_wrong(table_, args_.gradients.dc, p_.c_type, p_.V * p_.D, stream_);
  }
  if (p_.needs_dbias) {
    poison_where_wrong(table_, args_.gradients.dbias, p_.bias_type, p_.V, stream_);
  }
}

template <class T>
T* CudaParts<T>::de_sums(Rows chunk) const {
  T* sums = buffer<T>(use::kDeSums);
  return sums != nullptr ? sums : static_cast<T*>(args_.gradients.de) + chunk.begin * p_.D;
}

template <class T>
T* CudaParts<T>::dc_sums(Columns columns) const {
  T* sums = buffer<T>(use::kDcSums);
  if (sums == nullptr) return static_cast<T*>(args_.gradients.dc) + columns.begin * p_.D;
  const bool one_chunk = plan_.chunk_rows >= row_count(p_);
  return sums + (one_chunk ? 0 : columns.begin * p_.D);
}

template <class T>
void CudaParts<T>::sum_loss(void* loss, const bool* undefined) {
  cuda::sum_loss<T>(row_facts(), args_.rows, args_.upstream, undefined, loss, stream_);
}

template class CudaParts<float>;
template class CudaParts<double>;

}  // namespace cutloss::cuda
