// Included before every source file of the library: what the public headers declare is exported
// from a shared library, and, everything being compiled with -fvisibility=hidden, nothing else is.
#pragma once

#pragma GCC visibility push(default)
#include "cutloss/cutloss.h"
#pragma GCC visibility pop
