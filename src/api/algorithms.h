#pragma once

#include <span>

#include "core/device_calls.h"
#include "plan/algorithm.h"

namespace cutloss {

// Every engine of this build, in the order in which a plan asks them.
std::span<const Engine* const> engines();

// The table of what a device does without a plan. Throws Error(unsupported), which names `call`,
// where this build has nothing for the device.
const DeviceCalls& calls_of(Device device, const char* call);

// Does the work of weighted_loss for either source. Throws Error(invalid_value) where a pointer is
// missing.
void sum_loss(const LossSum& sum, void* loss, void* stream);

}  // namespace cutloss
