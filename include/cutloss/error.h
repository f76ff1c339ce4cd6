// The exception that every call throws.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cutloss {

enum class ErrorCode : std::uint8_t {
  invalid_value,  // a size, an option, a target
  invalid_type,   // a dtype, or a mix of dtypes
  unsupported,    // a valid request that no engine fulfils; the message says what to do instead
  workspace,      // max_workspace is too small for every plan
  out_of_memory,  // a library could not allocate
  internal,       // a defect of cutloss
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace cutloss
