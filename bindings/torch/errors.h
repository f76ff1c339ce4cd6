// What PyTorch's own failures say to the user.
#pragma once

#include <string>

namespace cutloss::binding {

// The message of an exception that PyTorch's headers threw, without the places in the sources of
// this build that they put into it, and with the reason, which they leave out.
std::string words_of(const std::string& what);

// Whether PyTorch's last failure on this thread, in a call that allocates, was for want of memory.
// An earlier kernel's fault or a size beyond all numbers is reported by the same calls. True too
// where PyTorch gives no reason (before 2.13).
bool may_be_out_of_memory();

}  // namespace cutloss::binding
