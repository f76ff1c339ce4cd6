#pragma once

#include <span>

#include "core/device_calls.h"
#include "plan/algorithm.h"

namespace cutloss {

// Every engine of this build, in the order in which a plan asks them.
std::span<const Engine* const> engines();

// What a device does that takes no plan. Throws Error(unsupported), which names `call`, where this
// build has nothing for the device.
const DeviceCalls& calls_of(Device device, const char* call);

// weighted_loss of either source. Throws Error(invalid_value) where it misses a pointer.
void sum_loss(const LossSum& sum, void* loss, void* stream);

}  // namespace cutloss
