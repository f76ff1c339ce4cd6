// The per-row outputs of a call as tensors, (rows) each. What is not wanted has no elements.
#pragma once

#include "convert.h"
#include "device.h"

namespace cutloss::binding {

struct RowTensors {
  Tensor nll, lse, row_max, log_sum, entropy, zbar_centred, argmax;

  // On the device of `like`, uninitialised. type: the stat dtype.
  RowTensors(const Tensor& like, std::int64_t rows, ScalarType type, const Wanted& wanted) {
    const auto make = [&](ScalarType of, bool is_wanted = true) {
      return new_tensor(like, {is_wanted ? rows : 0}, of);
    };
    nll = make(type);
    lse = make(type);
    row_max = make(type);
    log_sum = make(type);
    entropy = make(type, wanted.entropy);
    zbar_centred = make(type, wanted.zbar);
    argmax = make(ScalarType::Long, wanted.argmax);
  }

  RowOutputs outputs() const {
    RowOutputs out;
    out.nll = data(nll);
    out.lse = data(lse);
    out.row_max = data(row_max);
    out.log_sum = data(log_sum);
    out.entropy = data(entropy);
    out.zbar_centred = data(zbar_centred);
    out.argmax = static_cast<std::int64_t*>(data(argmax));
    return out;
  }

  // All of them, in the order of their names.
  void put(Stack& stack) const {
    for (const Tensor* t : {&nll, &lse, &row_max, &log_sum, &entropy, &zbar_centred, &argmax}) {
      stack.put(*t);
    }
  }
};

// The same in one tensor, for a call that shows none of them but argmax: each tensor costs the
// allocator's time, and a small loss is made of little else.
struct RowsInOne {
  Tensor rows, argmax;
  RowOutputs outputs;

  RowsInOne(const Tensor& like, std::int64_t count, ScalarType type, const Wanted& wanted) {
    const std::int64_t apart = (count + 63) / 64 * 64;  // each begins where a tensor might
    const std::int64_t tensors = 4 + (wanted.entropy ? 1 : 0) + (wanted.zbar ? 1 : 0);
    rows = new_tensor(like, {tensors * apart}, type);
    argmax = new_tensor(like, {wanted.argmax ? count : 0}, ScalarType::Long);
    auto* next = static_cast<std::byte*>(rows.mutable_data_ptr());
    const std::int64_t bytes = apart * rows.element_size();
    for (void** row : {&outputs.nll, &outputs.lse, &outputs.row_max, &outputs.log_sum}) {
      *row = next;
      next += bytes;
    }
    if (wanted.entropy) {
      outputs.entropy = next;
      next += bytes;
    }
    if (wanted.zbar) outputs.zbar_centred = next;
    outputs.argmax = static_cast<std::int64_t*>(data(argmax));
  }
};

}  // namespace cutloss::binding
