#include "cuda/fused/components.h"

#include "core/refuse.h"

namespace cutloss::cuda::fused {
namespace {

// Refuses an address that the copy engine cannot read: it reads rows in units of 16 bytes.
void need_alignment(const void* data, const char* member) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16 == 0) return;
  refuse_value(member,
               " must start at a multiple of 16 bytes for engine cuda/fused_sm90, got address ",
               data, "; copy it, or set the problem's engine to cuda/library");
}

}  // namespace

Components::Components(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
    : call(std::move(decision), args, pass),
      d(static_cast<const FusedDecision&>(call.d)),
      rows(call),
      operands(call, rows),
      products(call),
      coefficients(call, rows, operands),
      sums(call, rows, operands, products) {
  if (call.head.e_type == d.operand && row_count(call.p) > 0) need_alignment(args.in.e, "in.e");
  if (call.head.c_type == d.operand) need_alignment(args.in.c, "in.c");
  if (makes_gradients(pass)) {
    need_alignment(args.gradients.de, "gradients.de");
    need_alignment(args.gradients.dc, "gradients.dc");
  }
}

void Components::begin() {
  rows.list();
  operands.begin();
}

Listed Components::listed(RowRange range) const {
  return {rows.table(), static_cast<int>(range.begin), static_cast<int>(range.count)};
}

const float* Components::inv_temperature(std::int64_t entry) const {
  return static_cast<const float*>(rows.table().inv_temperature) + entry;
}

Logits Components::logits(RowRange range, Columns columns, const Matrix& e, bool by_position) {
  const Transform& transform = call.p.transform;
  Logits l;
  l.type = d.operand;
  l.e = e;
  if (by_position) {
    l.positions = rows.table().position;
    l.e_rows = positions();
  }
  l.c = operands.c(columns);
  l.rows = static_cast<int>(range.count);
  l.columns = static_cast<int>(columns.count);
  l.depth = static_cast<int>(call.head.D);
  l.count = rows.table().count;
  l.first = static_cast<int>(range.begin);
  l.transform.bias = operands.bias(columns.begin);
  l.transform.inv_temperature = inv_temperature(range.begin);
  l.transform.scale = static_cast<float>(transform.logit_scale);
  l.transform.softcap = operands.softcap();
  l.transform.inv_softcap = transform.softcap ? static_cast<float>(1.0 / *transform.softcap) : 0.f;
  l.target = rows.table().target + range.begin;
  l.origin = static_cast<int>(columns.begin);
  return l;
}

}  // namespace cutloss::cuda::fused
