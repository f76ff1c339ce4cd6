// Per-row outputs, as far as they are wanted.
#pragma once

#include "cutloss/call.h"

namespace cutloss {

// What is not wanted is not written, even where there is room for it.
inline RowOutputs wanted_outputs(const Wanted& wanted, RowOutputs rows) {
  if (!wanted.entropy) rows.entropy = nullptr;
  if (!wanted.zbar) rows.zbar = rows.zbar_centred = nullptr;
  if (!wanted.argmax) rows.argmax = nullptr;
  return rows;
}

}  // namespace cutloss
