// The table of oneDNN's functions, from a library that is opened when they are first needed.
//
// CUTLOSS_ONEDNN_NAME and CUTLOSS_ONEDNN_FILE are the name and the place of the one that cutloss
// was built with.
#include <dlfcn.h>

#include <string>
#include <type_traits>

#include "core/text.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/onednn.h"

namespace cutloss::cpu {
namespace {

// With DEEPBIND the library's own functions go before those of the process. libtorch_cpu has
// another oneDNN within it and shows a few of its functions, which would take the place of this
// one's.
int scope() {
  const bool sanitized = dlsym(RTLD_DEFAULT, "__asan_init") != nullptr;  // ASan refuses DEEPBIND
  return RTLD_NOW | RTLD_LOCAL | (sanitized ? 0 : RTLD_DEEPBIND);
}

struct Library {
  OneDnn functions{};
  std::string refusal;  // the reason why it is not there, or empty
};

Library open() {
  Library library;
  void* handle = nullptr;
  std::string tried;
  for (const char* place : {CUTLOSS_ONEDNN_NAME, CUTLOSS_ONEDNN_FILE}) {
    if (handle = dlopen(place, scope()); handle != nullptr) break;
    tried += text(tried.empty() ? "" : "; ", dlerror());
  }
  if (handle == nullptr) {
    library.refusal =
        text("oneDNN could not be opened (", tried,
             "): install " CUTLOSS_ONEDNN_NAME ", or put its directory into LD_LIBRARY_PATH");
    return library;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
    if (function == nullptr) library.refusal = text(CUTLOSS_ONEDNN_NAME " has no function ", name);
  };
#define CUTLOSS_ONEDNN_FIND(name) find(library.functions.name, #name);
  CUTLOSS_ONEDNN_FUNCTIONS(CUTLOSS_ONEDNN_FIND)
#undef CUTLOSS_ONEDNN_FIND
  return library;
}

const Library& library() {
  static const Library opened = open();
  return opened;
}

}  // namespace

const OneDnn& onednn() { return library().functions; }

std::string onednn_refusal() { return library().refusal; }

}  // namespace cutloss::cpu
