// Builds a message from its parts: text("N is ", n, ", expected > 0").
#pragma once

#include <cstdint>
#include <iomanip>
#include <sstream>
#include <string>

namespace cutloss {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Writes a number with two digits behind the point: "4.13".
inline std::string rounded(double value) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(2) << value;
  return out.str();
}

// Writes an amount of memory exactly and, from 1 MiB on, in the unit that people think in:
// "14762048 bytes (14.1 MiB)".
inline std::string memory_text(std::int64_t bytes) {
  constexpr std::int64_t kMiB = std::int64_t{1} << 20;
  std::ostringstream out;
  out << bytes << " bytes";
  if (bytes >= kMiB) {
    out << " (" << std::fixed << std::setprecision(bytes % kMiB == 0 ? 0 : 1)
        << static_cast<double>(bytes) / kMiB << " MiB)";
  }
  return out.str();
}

}  // namespace cutloss
