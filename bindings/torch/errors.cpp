#include "errors.h"

#include <algorithm>
#include <cctype>

// Why the last call of this thread failed; of PyTorch 2.13 and later, before which PyTorch writes
// it to stderr. Null where there is no such function.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace cutloss::binding {
namespace {

// An operator's name, in quotes, or that of a C function.
std::string name_of(const std::string& call) {
  const auto quote = call.find('"');
  if (quote == std::string::npos) return call.substr(0, call.find('('));
  return call.substr(quote + 1, call.find('"', quote + 1) - quote - 1);
}

const char* known_reason() {
  const bool is_known = torch_exception_get_what_without_backtrace != nullptr;
  return is_known ? torch_exception_get_what_without_backtrace() : nullptr;
}

std::string reason() {
  const char* why = known_reason();
  return why == nullptr ? "PyTorch has written the reason to stderr" : std::string(why);
}

bool is_place(const std::string& text) {  // "file:12"
  const auto colon = text.rfind(':');
  return colon != std::string::npos && colon + 1 < text.size() &&
         std::all_of(text.begin() + colon + 1, text.end(),
                     [](unsigned char c) { return std::isdigit(c) != 0; });
}

}  // namespace

std::string words_of(const std::string& what) {
  // TORCH_ERROR_CODE_CHECK: "call(...) API call failed at file, line 12"
  const auto failed = what.find(" API call failed at ");
  if (failed != std::string::npos) {
    return "PyTorch's " + name_of(what.substr(0, failed)) + " failed: " + reason();
  }
  // STD_TORCH_CHECK: "function, file:12, message"
  const auto file = what.find(", ");
  const auto message = file == std::string::npos ? file : what.find(", ", file + 2);
  if (message == std::string::npos || !is_place(what.substr(file + 2, message - file - 2))) {
    return what;
  }
  return what.substr(message + 2);
}

bool may_be_out_of_memory() {
  const char* why = known_reason();
  if (why == nullptr) return true;
  const std::string words(why);
  const auto says = [&](const char* part) { return words.find(part) != std::string::npos; };
  return says("out of memory") || says("can't allocate") || says("DefaultCPUAllocator");
}

}  // namespace cutloss::binding
