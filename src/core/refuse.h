// Refusals: errors whose message is made of its parts, as that of text.h is.
#pragma once

#include "core/text.h"
#include "cutloss/error.h"

namespace cutloss {

template <class... Parts>
[[noreturn]] void refuse(ErrorCode code, const Parts&... parts) {
  throw Error(code, text(parts...));
}

template <class... Parts>
[[noreturn]] void refuse_value(const Parts&... parts) {
  refuse(ErrorCode::invalid_value, parts...);
}

}  // namespace cutloss
