// What is kept of a chunk's logits between its statistics and its gradients.
#pragma once

#include "cpu/call.h"

namespace cutloss::cpu {

// T is the stat dtype.
template <class T>
class KeptLogits {
 public:
  explicit KeptLogits(const Call& call) : call_(call) {
    if (call.d.kept.bytes() == 0) return;
    logits_ = call.kept<void>(buffer::kKept);
    if (call.d.keeps_exponentials) maxima_ = call.kept<T>(buffer::kMaxima);
  }

  // Where a row of the chunk is kept in a slab's columns: exponentials or logits, as kept_type.
  void* row(std::int64_t in_chunk, Columns columns) const {
    const CpuDecision& d = call_.d;
    const bool in_dc = in_chunk < d.rows_in_dc;
    void* base =
        in_dc ? call_.dc(columns.begin)
              : at(logits_, d.kept_type, columns.begin * (d.sizes.chunk_rows - d.rows_in_dc));
    const std::int64_t of_base = in_dc ? in_chunk : in_chunk - d.rows_in_dc;
    return at(base, d.kept_type, of_base * columns.count);
  }

  // The maximum that the exponentials of that row and slab are relative to.
  T& slab_max(std::int64_t in_chunk, Columns columns) const {
    return maxima_[in_chunk * call_.d.slab_count() + columns.begin / call_.d.sizes.slab];
  }

 private:
  const Call& call_;
  void* logits_ = nullptr;
  T* maxima_ = nullptr;
};

}  // namespace cutloss::cpu
