// Between the public calls over logits and the devices that do them.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/engine.h"
#include "cutloss/logits.h"

namespace cutloss {

// logit_scale lies in the two numbers of the transform z = cap * tanh(a / cap) * scale, so that no
// engine knows of it: cap * tanh(a / cap) is even in cap. 0: no softcap.
inline double folded_softcap(const Problem& p) {
  return p.transform.softcap ? *p.transform.softcap / std::fabs(p.transform.logit_scale) : 0.0;
}

// The passes of a checked call. With both, the gradient of a row follows its statistics.
void cpu_logits(const Problem& problem, const LogitsArgs& args, Passes passes);
void cuda_logits(const Problem& problem, const LogitsArgs& args, Passes passes);

void cpu_weighted_loss(const Problem& problem, const LogitsArgs& args, void* loss,
                       const bool* undefined);
void cuda_weighted_loss(const Problem& problem, const LogitsArgs& args, void* loss,
                        const bool* undefined);

}  // namespace cutloss
