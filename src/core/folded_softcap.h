#pragma once

#include <cmath>

#include "cutloss/problem.h"

namespace cutloss {

// logit_scale lies in the two numbers of the transform z = cap * tanh(a / cap) * scale, so that
// what is done to logits that exist knows nothing of it: cap * tanh(a / cap) is even in cap. 0: no
// softcap.
inline double folded_softcap(const Problem& p) {
  return p.transform.softcap ? *p.transform.softcap / std::fabs(p.transform.logit_scale) : 0.0;
}

}  // namespace cutloss
