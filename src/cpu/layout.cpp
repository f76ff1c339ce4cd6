#include "cpu/layout.h"

#include <algorithm>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "cpu/gemm.h"

namespace cutloss::cpu {
namespace {

class Shelf {
 public:
  std::int64_t place(std::int64_t bytes) {
    const std::int64_t offset = bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_ = 0;
};

}  // namespace

DType product_type(const Problem& p) {
  switch (p.compute_type) {
    case DType::f64:
      return DType::f64;
    case DType::bf16:
      return has_native_bf16() ? DType::bf16 : DType::f32;
    case DType::f16:  // no processor multiplies f16 with f32 sums; f32 holds every f16
    case DType::f32:
      return DType::f32;
  }
  return DType::f32;
}

bool keeps_exponentials(const Problem& p) {
  return !p.upstream.entropy && !(p.transform.softcap && p.upstream.zbar);
}

DType kept_type(const Problem& p) {
  return keeps_exponentials(p) ? product_type(p) : stat_type(p.compute_type);
}

bool accumulates_in_place(DType gradient_type, const Problem& p) {
  return gradient_type == stat_type(p.compute_type);
}

std::int64_t slab_count(const Plan& plan) {
  return (classes_of(plan.problem).count + plan.slab - 1) / plan.slab;
}

WorkspaceLayout workspace_layout(const Plan& plan, Passes passes) {
  const auto [forward, backward] = passes;
  const Problem& p = plan.problem;
  const Head& head = head_of(p);
  const std::int64_t operand = size_of(product_type(p));
  const std::int64_t stat = size_of(stat_type(p.compute_type));
  const std::int64_t state =
      p.compute_type == DType::f64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
  const bool from_kept = plan.schedule == Schedule::rows;
  Shelf shelf;
  WorkspaceLayout layout;
  layout.row_list = shelf.place((1 + row_count(p)) * 8);
  if (forward) layout.states = shelf.place(plan.chunk_rows * state);
  layout.e_block = shelf.place(plan.block_rows * head.D * operand);
  if (head.c_type != product_type(p)) layout.c_slab = shelf.place(plan.slab * head.D * operand);
  if (head.has_bias && head.bias_type != stat_type(p.compute_type)) {
    layout.bias = shelf.place(head.classes.count * stat);
  }
  if (forward || !from_kept) layout.z = shelf.place(plan.block_rows * plan.slab * stat);
  if (!backward) {
    layout.bytes = shelf.bytes();
    return layout;
  }
  if (product_type(p) == DType::bf16 || from_kept) {
    layout.g = shelf.place(plan.block_rows * plan.slab * operand);
  }
  if (p.wanted.de.wanted && !accumulates_in_place(head.e_type, p)) {
    layout.de_sums = shelf.place(plan.chunk_rows * head.D * stat);
  }
  if (p.wanted.dc.wanted && !accumulates_in_place(head.c_type, p)) {
    const bool one_chunk = plan.chunk_rows >= row_count(p);
    layout.dc_sums = shelf.place((one_chunk ? plan.slab : head.classes.count) * head.D * stat);
  }
  if (p.wanted.dbias.wanted) layout.dbias_sums = shelf.place(head.classes.count * 8);
  layout.bytes = shelf.bytes();
  return layout;
}

KeptLayout kept_layout(const Plan& plan) {
  const Problem& p = plan.problem;
  const Head& head = head_of(p);
  KeptLayout layout;
  if (plan.schedule != Schedule::rows) return layout;
  const std::int64_t element = size_of(kept_type(p));
  const bool dc_is_there =
      p.wanted.dc.wanted && !plan.keeps_logits && plan.chunk_rows >= row_count(p);
  // With several blocks of rows a slab of dC may be written before the last block has been read,
  // unless its sums are elsewhere.
  const bool written_last =
      plan.block_rows >= plan.chunk_rows || !accumulates_in_place(head.c_type, p);
  if (dc_is_there && written_last) {
    layout.rows_in_dc = std::min(plan.chunk_rows, head.D * size_of(head.c_type) / element);
  }
  Shelf shelf;
  layout.logits = shelf.place((plan.chunk_rows - layout.rows_in_dc) * head.classes.count * element);
  if (keeps_exponentials(p)) {
    layout.slab_maxima =
        shelf.place(plan.chunk_rows * slab_count(plan) * size_of(stat_type(p.compute_type)));
  }
  layout.bytes = shelf.bytes();
  return layout;
}

}  // namespace cutloss::cpu
