// oneDNN's functions of a library that is opened when they are first needed.
//
// CUTLOSS_ONEDNN_NAME and CUTLOSS_ONEDNN_FILE are the name and the place of the one that cutloss
// was built with.
#include <dlfcn.h>

#include <string>

#include "core/text.h"
#include "cpu/onednn.h"
#include "cutloss/cutloss.h"

namespace cutloss::cpu {
namespace {

// DEEPBIND: its own functions go before those of the process. libtorch_cpu has another oneDNN
// within it and shows a few of its functions, which would take the place of this one's.
int scope() {
  const bool sanitized = dlsym(RTLD_DEFAULT, "__asan_init") != nullptr;  // refuses DEEPBIND
  return RTLD_NOW | RTLD_LOCAL | (sanitized ? 0 : RTLD_DEEPBIND);
}

OneDnn opened() {
  std::string why;
  void* library = nullptr;
  for (const char* place : {CUTLOSS_ONEDNN_NAME, CUTLOSS_ONEDNN_FILE}) {
    if (library = dlopen(place, scope()); library != nullptr) break;
    why += text(why.empty() ? "" : "; ", dlerror());
  }
  if (library == nullptr) {
    throw Error(ErrorCode::unsupported,
                text("the CPU engine needs oneDNN, which could not be opened (", why,
                     "): install " CUTLOSS_ONEDNN_NAME ", or put its directory into "
                     "LD_LIBRARY_PATH"));
  }
  OneDnn functions{};
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) {
      throw Error(ErrorCode::unsupported, text(CUTLOSS_ONEDNN_NAME " has no function ", name));
    }
  };
#define CUTLOSS_ONEDNN_FIND(name) find(functions.name, #name);
  CUTLOSS_ONEDNN_FUNCTIONS(CUTLOSS_ONEDNN_FIND)
#undef CUTLOSS_ONEDNN_FIND
  return functions;
}

}  // namespace

const OneDnn& onednn() {
  static const OneDnn functions = opened();
  return functions;
}

}  // namespace cutloss::cpu
