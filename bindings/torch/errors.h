// What PyTorch's own failures say to the user.
#pragma once

#include <string>

namespace cutloss::binding {

// The message of an exception that PyTorch's headers threw, without the places in the sources of
// this build that they put into it, and with the reason, which they leave out.
std::string words_of(const std::string& what);

}  // namespace cutloss::binding
