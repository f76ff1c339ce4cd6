#pragma once

#include <memory>

#include "core/engine.h"

namespace cutloss::cpu {

std::unique_ptr<Parts> bind_parts(const Plan& plan, const Args& args, Passes passes);

}  // namespace cutloss::cpu
