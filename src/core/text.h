// Builds a message from its parts: text("N is ", n, ", expected > 0").
#pragma once

#include <sstream>
#include <string>

namespace cutloss {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace cutloss
