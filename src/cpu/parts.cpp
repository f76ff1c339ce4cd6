// The parts of the CPU engine, for statistics in float or double.
#include "cpu/parts.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/loss_terms.h"
#include "core/text.h"
#include "core/validate.h"
#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/row_ops.h"

namespace cutloss::cpu {
namespace {

// A read-only matrix, ready for a product.
struct Matrix {
  const void* data = nullptr;
  std::int64_t stride = 0;
};

// The columns that one thread takes at a time in column sums, and the rows it sums at a time.
constexpr std::int64_t kStrip = 512;
constexpr std::int64_t kFewRows = 32;

template <class T>
class CpuParts final : public Parts {
 public:
  CpuParts(const Plan& plan, const Args& args, Passes passes)
      : plan_(plan),
        p_(plan.problem),
        args_(args),
        layout_(workspace_layout(plan, passes)),
        kept_(kept_layout(plan)),
        operand_(product_type(plan.problem)),
        predicted_(p_.length - p_.shift) {}

  void list_rows() override {
    std::int64_t* list = row_list();
    std::int64_t count = 0;
    const std::int64_t rows = row_count(p_);
    for (std::int64_t n = 0; n < rows; ++n) {
      const std::int64_t target = target_of(n);
      if (target == p_.ignore_index) continue;
      check_row(n, target);
      list[1 + count++] = n;
    }
    list[0] = count;
  }

  std::int64_t rows_to_cover() const override { return row_list()[0]; }

  RowList list(Rows rows) const override { return {row_list() + 1 + rows.begin, rows.count}; }

  void clear_ignored_outputs() override {
    const std::int64_t rows = row_count(p_);
    if (rows_to_cover() == rows) return;
    for (std::int64_t n = 0; n < rows; ++n) {
      if (target_of(n) != p_.ignore_index) continue;
      const RowOutputs out = wanted_outputs();
      for (void* array :
           {out.nll, out.lse, out.row_max, out.log_sum, out.entropy, out.zbar, out.zbar_centred}) {
        if (array != nullptr) static_cast<T*>(array)[n] = T(0);
      }
      if (out.argmax != nullptr) out.argmax[n] = -1;
    }
  }

  void begin_statistics(Rows chunk) override {
    load_bias();
    std::fill_n(states(), chunk.count, RowState<T>{});
  }

  void accumulate_statistics(const Block& block, bool keep) override {
    const Columns columns = block.columns;
    T* z = buffer<T>(layout_.z);
    multiply_logits(block, z);

    StatisticsRow<T> shared{};
    shared.columns = columns.count;
    shared.first_column = columns.begin;
    shared.entropy = p_.wants_entropy;
    shared.argmax = p_.wants_argmax;
    shared.zbar = p_.wants_zbar;
    shared.class_weight = class_weight(columns);
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < block.rows.count; ++r) {
      const std::int64_t n = row_at(block.rows.begin + r);
      const std::int64_t in_chunk = block.rows.begin - block.chunk.begin + r;
      StatisticsRow<T> row = shared;
      row.z = z + r * columns.count;
      row.target = target_of(n);
      row.transform = transform_of(n, columns);
      void* kept = keep ? kept_row(in_chunk, columns) : nullptr;
      const bool exponentials = keep && keeps_exponentials(p_);
      if (exponentials && operand_ == DType::bf16) {
        row.exponentials_bf16 = static_cast<std::uint16_t*>(kept);
      } else if (exponentials) {
        row.exponentials = static_cast<T*>(kept);
      }
      // With a softcap the products are kept as they are: its slope cannot be told from z.
      const auto keep_z = [&] { std::memcpy(kept, row.z, columns.count * sizeof(T)); };
      if (keep && !exponentials && p_.softcap) keep_z();
      row_statistics(row, states()[in_chunk]);
      if (exponentials) slab_maxima(in_chunk)[columns.begin / plan_.slab] = row.slab_max;
      if (keep && !exponentials && !p_.softcap) keep_z();
    }
  }

  void finish_statistics(Rows chunk) override {
    const RowOutputs out = wanted_outputs();
    const auto write = [](void* array, std::int64_t n, T value) {
      if (array != nullptr) static_cast<T*>(array)[n] = value;
    };
    for (std::int64_t r = 0; r < chunk.count; ++r) {
      const std::int64_t n = row_at(chunk.begin + r);
      const std::int64_t target = target_of(n);
      const T weight = p_.has_class_weight ? *class_weight({target, 1}) : T(1);
      const RowResult<T> result = close(states()[r], target, weight, p_.V);
      write(out.nll, n, result.nll);
      write(out.lse, n, result.lse);
      write(out.row_max, n, result.row_max);
      write(out.log_sum, n, result.log_sum);
      write(out.entropy, n, result.entropy);
      write(out.zbar, n, result.zbar);
      write(out.zbar_centred, n, result.zbar_centred);
      if (out.argmax != nullptr) out.argmax[n] = result.argmax;
    }
  }

  void make_g(const Block& block, bool from_kept) override {
    load_bias();
    if (!from_kept) multiply_logits(block, buffer<T>(layout_.z));
    g_ = buffer<void>(layout_.g >= 0 ? layout_.g : layout_.z);
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < block.rows.count; ++r) {
      const GradientRow<T> row = gradient_row(row_at(block.rows.begin + r), block.columns);
      void* g = at(g_, operand_, r * block.columns.count);
      if (from_kept) {
        make_g_from_kept(row, block.rows.begin + r, block, g);
      } else {
        T* z = buffer<T>(layout_.z) + r * block.columns.count;
        const Transform<T> transform = transform_of(row_at(block.rows.begin + r), block.columns);
        make_g_from_logits(row, z, &transform, g);
      }
    }
  }

  // Threads take columns, so that every sum runs over the rows in order. A few rows at a time are
  // summed in the stat dtype, those sums in fp64: where all rows are alike, a long sum in fp32
  // would lose digits that no product loses.
  void accumulate_dbias(const Block& block) override {
    double* sums = buffer<double>(layout_.dbias_sums) + block.columns.begin;
    const std::int64_t columns = block.columns.count;
    const std::int64_t rows = block.rows.count;
    if (block.rows.begin == 0) std::fill_n(sums, columns, 0.0);
#pragma omp parallel for schedule(static)
    for (std::int64_t v = 0; v < columns; v += kStrip) {
      const std::int64_t count = std::min(kStrip, columns - v);
      std::array<T, kStrip> few;
      for (std::int64_t r = 0; r < rows; r += kFewRows) {
        std::fill_n(few.begin(), count, T(0));
        for (std::int64_t i = r; i < std::min(r + kFewRows, rows); ++i) {
          add_row(i * columns + v, few.data(), count);
        }
        for (std::int64_t j = 0; j < count; ++j) sums[v + j] += static_cast<double>(few[j]);
      }
    }
  }

  void accumulate_de(const Block& block) override {
    const Matrix c = load_columns(block.columns);
    Product product{};
    product.M = block.rows.count;
    product.N = p_.D;
    product.K = block.columns.count;
    product.a = {g_, block.columns.count, false};
    product.b = {c.data, c.stride, false};
    product.c = de_sums(block.chunk) + (block.rows.begin - block.chunk.begin) * p_.D;
    product.c_stride = p_.D;
    product.type = operand_;
    product.c_type = stat_type(p_.compute_type);
    product.alpha = p_.logit_scale;
    product.accumulate = block.columns.begin > 0;
    multiply(product);
  }

  void accumulate_dc(const Block& block) override {
    const Matrix e = load_rows(block.rows);
    Product product{};
    product.M = block.columns.count;
    product.N = p_.D;
    product.K = block.rows.count;
    product.a = {g_, block.columns.count, true};
    product.b = {e.data, e.stride, false};
    product.c = one_product_makes_dc()
                    ? at(args_.gradients.dc, p_.c_type, block.columns.begin * p_.D)
                    : dc_sums(block.columns);
    product.c_stride = p_.D;
    product.type = operand_;
    product.c_type = one_product_makes_dc() ? p_.c_type : stat_type(p_.compute_type);
    product.alpha = p_.logit_scale;
    product.accumulate = block.rows.begin > 0;
    multiply(product);
  }

  void store_dc(Columns columns) override {
    if (layout_.dc_sums < 0 || one_product_makes_dc()) return;
    const T* sums = dc_sums(columns);
#pragma omp parallel for schedule(static)
    for (std::int64_t v = 0; v < columns.count; ++v) {
      convert(stat_type(p_.compute_type), sums + v * p_.D, p_.c_type,
              at(args_.gradients.dc, p_.c_type, (columns.begin + v) * p_.D), p_.D);
    }
  }

  void store_de(Rows chunk) override {
    if (layout_.de_sums < 0) return;  // finish_gradients moves the rows to their places
    const T* sums = de_sums(chunk);
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < chunk.count; ++r) {
      convert(stat_type(p_.compute_type), sums + r * p_.D, p_.e_type,
              at(args_.gradients.de, p_.e_type, position(row_at(chunk.begin + r)) * p_.D), p_.D);
    }
  }

  void finish_gradients() override {
    if (p_.needs_de) {
      if (layout_.de_sums < 0) spread_de();
      clear_unpredicted_de();
    }
    const bool none = rows_to_cover() == 0;
    if (p_.needs_dc && none) {
      std::memset(args_.gradients.dc, 0,
                  static_cast<std::size_t>(p_.V * p_.D * size_of(p_.c_type)));
    }
    if (p_.needs_dbias) store_dbias(none);
  }

  void sum_loss(void* loss, const bool* undefined) override {
    const auto counts = [&](std::int64_t n) { return target_of(n) != p_.ignore_index; };
    *static_cast<T*>(loss) =
        weighted_sum<T>(row_count(p_), counts, args_.rows, args_.upstream, undefined);
  }

 private:
  // What is not wanted is not written, even where there is room for it.
  RowOutputs wanted_outputs() const {
    RowOutputs out = args_.rows;
    if (!p_.wants_entropy) out.entropy = nullptr;
    if (!p_.wants_zbar) out.zbar = out.zbar_centred = nullptr;
    if (!p_.wants_argmax) out.argmax = nullptr;
    return out;
  }

  template <class U>
  U* buffer(std::int64_t offset) const {
    return reinterpret_cast<U*>(static_cast<std::byte*>(args_.workspace) + offset);
  }

  std::int64_t* row_list() const { return buffer<std::int64_t>(layout_.row_list); }
  std::int64_t row_at(std::int64_t i) const { return row_list()[1 + i]; }
  RowState<T>* states() const { return buffer<RowState<T>>(layout_.states); }

  // A row's place among the rows of E.
  std::int64_t position(std::int64_t n) const {
    return n / predicted_ * p_.length + n % predicted_;
  }

  std::int64_t target_of(std::int64_t n) const {
    const std::int64_t i = position(n) + p_.shift;
    return p_.target_type == IndexType::i64 ? static_cast<const std::int64_t*>(args_.in.targets)[i]
                                            : static_cast<const std::int32_t*>(args_.in.targets)[i];
  }

  void check_row(std::int64_t n, std::int64_t target) const {
    const Position at{n / predicted_, n % predicted_ + p_.shift};
    check_target(target, p_.V, p_.ignore_index, at);
    if (!p_.has_row_temperature) return;
    const double own = static_cast<const T*>(args_.in.temperature)[n];
    check_row_temperature(own, own * p_.temperature, stat_type(p_.compute_type), at);
  }

  T inv_temperature(std::int64_t n) const {
    const double own =
        p_.has_row_temperature ? static_cast<const T*>(args_.in.temperature)[n] : 1.0;
    return static_cast<T>(1.0 / (own * p_.temperature));
  }

  Transform<T> transform_of(std::int64_t n, Columns columns) const {
    const T* bias =
        layout_.bias >= 0 ? buffer<T>(layout_.bias) : static_cast<const T*>(args_.in.bias);
    return {p_.has_bias ? bias + columns.begin : nullptr, static_cast<T>(p_.softcap.value_or(0)),
            inv_temperature(n)};
  }

  const T* class_weight(Columns columns) const {
    return p_.has_class_weight ? static_cast<const T*>(args_.in.class_weight) + columns.begin
                               : nullptr;
  }

  void load_bias() {
    if (layout_.bias < 0 || bias_loaded_) return;
    convert(p_.bias_type, args_.in.bias, stat_type(p_.compute_type), buffer<void>(layout_.bias),
            p_.V);
    bias_loaded_ = true;
  }

  // E of some rows: where it lies if its rows are evenly spaced and have the products' dtype,
  // else gathered and converted.
  Matrix load_rows(Rows rows) {
    const std::int64_t first = row_at(rows.begin);
    const std::int64_t last = row_at(rows.begin + rows.count - 1);
    const bool contiguous = last - first == rows.count - 1;
    const bool even =
        contiguous && (e_offset(last) - e_offset(first)) == (rows.count - 1) * p_.e_row_stride;
    if (even && p_.e_type == operand_) {
      return {at(args_.in.e, p_.e_type, e_offset(first)), p_.e_row_stride};
    }
    void* packed = buffer<void>(layout_.e_block);
    if (loaded_rows_.begin != rows.begin || loaded_rows_.count != rows.count) {
#pragma omp parallel for schedule(static)
      for (std::int64_t r = 0; r < rows.count; ++r) {
        convert(p_.e_type, at(args_.in.e, p_.e_type, e_offset(row_at(rows.begin + r))), operand_,
                at(packed, operand_, r * p_.D), p_.D);
      }
      loaded_rows_ = rows;
    }
    return {packed, p_.D};
  }

  std::int64_t e_offset(std::int64_t n) const {
    return n / predicted_ * p_.e_sequence_stride + n % predicted_ * p_.e_row_stride;
  }

  Matrix load_columns(Columns columns) {
    const void* first = at(args_.in.c, p_.c_type, columns.begin * p_.c_row_stride);
    if (p_.c_type == operand_) return {first, p_.c_row_stride};
    void* packed = buffer<void>(layout_.c_slab);
    if (loaded_columns_.begin != columns.begin || loaded_columns_.count != columns.count) {
#pragma omp parallel for schedule(static)
      for (std::int64_t v = 0; v < columns.count; ++v) {
        convert(p_.c_type, at(first, p_.c_type, v * p_.c_row_stride), operand_,
                at(packed, operand_, v * p_.D), p_.D);
      }
      loaded_columns_ = columns;
    }
    return {packed, p_.D};
  }

  void multiply_logits(const Block& block, T* z) {
    const Matrix e = load_rows(block.rows);
    const Matrix c = load_columns(block.columns);
    Product product{};
    product.M = block.rows.count;
    product.N = block.columns.count;
    product.K = p_.D;
    product.a = {e.data, e.stride, false};
    product.b = {c.data, c.stride, true};
    product.c = z;
    product.c_stride = block.columns.count;
    product.type = operand_;
    product.c_type = stat_type(p_.compute_type);
    product.alpha = p_.logit_scale;
    multiply(product);
  }

  // sums += g's elements from `offset` on.
  void add_row(std::int64_t offset, T* sums, std::int64_t count) const {
    if constexpr (std::is_same_v<T, float>) {
      if (operand_ == DType::bf16) {
        add_bf16(static_cast<const std::uint16_t*>(g_) + offset, sums, count);
        return;
      }
    }
    add(static_cast<const T*>(g_) + offset, sums, count);
  }

  void store_dbias(bool no_rows) const {
    const double* sums = buffer<double>(layout_.dbias_sums);
    std::array<T, kStrip> piece;
    for (std::int64_t v = 0; v < p_.V; v += kStrip) {
      const std::int64_t count = std::min(kStrip, p_.V - v);
      for (std::int64_t j = 0; j < count; ++j) {
        piece[j] = no_rows ? T(0) : static_cast<T>(sums[v + j]);
      }
      convert(stat_type(p_.compute_type), piece.data(), p_.bias_type,
              at(args_.gradients.dbias, p_.bias_type, v), count);
    }
  }

  // A row of a chunk in what is kept: exponentials or logits of a slab's columns.
  void* kept_row(std::int64_t in_chunk, Columns columns) const {
    const bool in_dc = in_chunk < kept_.rows_in_dc;
    void* base = in_dc ? at(args_.gradients.dc, p_.c_type, columns.begin * p_.D)
                       : at(static_cast<std::byte*>(args_.kept) + kept_.logits, kept_type(p_),
                            columns.begin * (plan_.chunk_rows - kept_.rows_in_dc));
    const std::int64_t row = in_dc ? in_chunk : in_chunk - kept_.rows_in_dc;
    return at(base, kept_type(p_), row * columns.count);
  }

  T* slab_maxima(std::int64_t in_chunk) const {
    auto* base = static_cast<std::byte*>(args_.kept) + kept_.slab_maxima;
    return reinterpret_cast<T*>(base) + in_chunk * slab_count(plan_);
  }

  // `listed`: the row's place in the list.
  void make_g_from_kept(const GradientRow<T>& row, std::int64_t listed, const Block& block,
                        void* g) const {
    const std::int64_t in_chunk = listed - block.chunk.begin;
    const Columns columns = block.columns;
    void* kept = kept_row(in_chunk, columns);
    if (!keeps_exponentials(p_)) {
      const Transform<T> transform = transform_of(row_at(listed), columns);
      make_g_from_logits(row, static_cast<T*>(kept), p_.softcap ? &transform : nullptr, g);
      return;
    }
    const T slab_max = slab_maxima(in_chunk)[columns.begin / plan_.slab];
    if constexpr (std::is_same_v<T, float>) {
      if (operand_ == DType::bf16) {
        row_gradient_from_exponentials_bf16(row, static_cast<const std::uint16_t*>(kept), slab_max,
                                            static_cast<std::uint16_t*>(g));
        return;
      }
    }
    row_gradient_from_exponentials(row, static_cast<const T*>(kept), slab_max, static_cast<T*>(g));
  }

  void make_g_from_logits(const GradientRow<T>& row, T* z, const Transform<T>* transform,
                          void* g) const {
    if constexpr (std::is_same_v<T, float>) {
      if (operand_ == DType::bf16) {
        row_gradient_bf16(row, z, transform, static_cast<std::uint16_t*>(g));
        return;
      }
    }
    row_gradient(row, z, transform, static_cast<T*>(g));
  }

  GradientRow<T> gradient_row(std::int64_t n, Columns columns) const {
    const auto read = [n](const void* array) {
      return array == nullptr ? T(0) : static_cast<const T*>(array)[n];
    };
    const T nll = read(args_.rows.nll);
    const T row_max = read(args_.rows.row_max);
    const T log_sum = read(args_.rows.log_sum);
    const RowUpstream<T> up = row_upstream<T>(args_.upstream, n, row_max + log_sum);
    GradientRow<T> row{};
    row.columns = columns.count;
    row.class_weight = class_weight(columns);
    RowCoefficients<T>& k = row.coefficients;
    k = row_coefficients(up, nll, row_max, log_sum, p_.V);
    k.entropy = k.d_entropy != T(0) ? read(args_.rows.entropy) : T(0);
    k.softcap = static_cast<T>(p_.softcap.value_or(0));
    k.inv_temperature = inv_temperature(n);
    const std::int64_t target = target_of(n) - columns.begin;
    row.target = target >= 0 && target < columns.count ? target : -1;
    if (row.target >= 0) {
      const T weight = row.class_weight == nullptr ? T(1) : row.class_weight[row.target];
      row.target_g = target_gradient(k, nll, up.d_nll, up.d_lse, weight);
    }
    return row;
  }

  // Where a chunk's dE accumulates: in the output, row after row of the list (finish_gradients
  // spreads them), or in the workspace.
  T* de_sums(Rows chunk) const {
    return layout_.de_sums >= 0 ? buffer<T>(layout_.de_sums)
                                : static_cast<T*>(args_.gradients.de) + chunk.begin * p_.D;
  }

  // Where one block holds every row, its product is dC, and rounds it itself.
  bool one_product_makes_dc() const {
    return p_.c_type == operand_ && rows_to_cover() <= plan_.block_rows;
  }

  T* dc_sums(Columns columns) const {
    if (layout_.dc_sums < 0) return static_cast<T*>(args_.gradients.dc) + columns.begin * p_.D;
    const bool one_chunk = plan_.chunk_rows >= row_count(p_);
    return buffer<T>(layout_.dc_sums) + (one_chunk ? 0 : columns.begin * p_.D);
  }

  // Moves the rows of dE from the front of the output to their places, last first, so that none
  // is overwritten before it has moved. Threads take columns.
  void spread_de() const {
    const std::int64_t count = rows_to_cover();
    if (count == 0 || position(row_at(count - 1)) == count - 1) return;
    T* de = static_cast<T*>(args_.gradients.de);
#pragma omp parallel for schedule(static)
    for (std::int64_t d = 0; d < p_.D; d += kStrip) {
      const auto bytes = static_cast<std::size_t>(std::min(kStrip, p_.D - d)) * sizeof(T);
      for (std::int64_t i = count - 1; i >= 0; --i) {
        const std::int64_t to = position(row_at(i));
        if (to != i) std::memcpy(de + to * p_.D + d, de + i * p_.D + d, bytes);
      }
    }
  }

  // Zeros in the rows of dE that predict nothing, or an ignored target.
  void clear_unpredicted_de() const {
    if (p_.sequences * p_.length == 0) return;
    const std::int64_t row_bytes = p_.D * size_of(p_.e_type);
    auto* de = static_cast<std::byte*>(args_.gradients.de);
    const std::int64_t count = rows_to_cover();
    std::int64_t next = 0;  // the first place not yet seen
    for (std::int64_t i = 0; i <= count; ++i) {
      const std::int64_t place = i < count ? position(row_at(i)) : p_.sequences * p_.length;
      std::memset(de + next * row_bytes, 0, static_cast<std::size_t>((place - next) * row_bytes));
      next = place + 1;
    }
  }

  const Plan& plan_;
  const Problem& p_;
  const Args& args_;
  const WorkspaceLayout layout_;
  const KeptLayout kept_;
  const DType operand_;
  const std::int64_t predicted_;  // rows of a sequence that predict a target
  void* g_ = nullptr;             // g of the last block
  Rows loaded_rows_{-1, 0};
  Columns loaded_columns_{-1, 0};
  bool bias_loaded_ = false;
};

}  // namespace

std::unique_ptr<Parts> bind_parts(const Plan& plan, const Args& args, Passes passes) {
  if (plan.problem.compute_type == DType::f64) {
    return std::make_unique<CpuParts<double>>(plan, args, passes);
  }
  return std::make_unique<CpuParts<float>>(plan, args, passes);
}

}  // namespace cutloss::cpu
