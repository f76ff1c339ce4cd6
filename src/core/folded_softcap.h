#pragma once

#include <cmath>

#include "cutloss/problem.h"

namespace cutloss {

// The softcap with logit_scale folded into it: the transform of logits that exist is then
// z = cap * tanh(a / cap) * scale, with two numbers instead of three. The sign of logit_scale does
// not matter to it, since cap * tanh(a / cap) is even in cap. 0 stands for no softcap.
inline double folded_softcap(const Problem& p) {
  return p.transform.softcap ? *p.transform.softcap / std::fabs(p.transform.logit_scale) : 0.0;
}

}  // namespace cutloss
