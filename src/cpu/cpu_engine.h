// The engine for processors: oneDNN and OpenBLAS products, Highway row work, OpenMP threads.
#pragma once

#include "core/engine.h"

namespace cutloss {

const Engine& cpu_engine();

}  // namespace cutloss
