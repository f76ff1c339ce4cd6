#pragma once

#include "core/device_calls.h"

namespace cutloss {

const DeviceCalls& cuda_calls();

namespace cuda {

void logits(const Problem& problem, const LogitsArgs& args, Pass pass);

}  // namespace cuda
}  // namespace cutloss
