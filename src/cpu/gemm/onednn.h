// oneDNN's C++ interface, over a table of the C functions that it calls. libcutloss opens the
// library when it is first needed, in a scope of its own; PyTorch's operators and the tests are
// linked to it (docs/decisions/0008). Include this instead of dnnl.hpp.
#pragma once

#include <oneapi/dnnl/dnnl.h>

#define CUTLOSS_ONEDNN_COMMON(X)      \
  X(dnnl_engine_create)               \
  X(dnnl_engine_destroy)              \
  X(dnnl_get_effective_cpu_isa)       \
  X(dnnl_memory_create)               \
  X(dnnl_memory_destroy)              \
  X(dnnl_post_ops_append_eltwise)     \
  X(dnnl_post_ops_append_sum)         \
  X(dnnl_post_ops_create)             \
  X(dnnl_post_ops_destroy)            \
  X(dnnl_primitive_attr_create)       \
  X(dnnl_primitive_attr_destroy)      \
  X(dnnl_primitive_attr_set_post_ops) \
  X(dnnl_primitive_create)            \
  X(dnnl_primitive_desc_destroy)      \
  X(dnnl_primitive_desc_query)        \
  X(dnnl_primitive_destroy)           \
  X(dnnl_primitive_execute)           \
  X(dnnl_set_max_cpu_isa)             \
  X(dnnl_stream_create)               \
  X(dnnl_stream_destroy)              \
  X(dnnl_stream_wait)                 \
  X(dnnl_version)
#if DNNL_VERSION_MAJOR < 3
#define CUTLOSS_ONEDNN_FUNCTIONS(X)       \
  CUTLOSS_ONEDNN_COMMON(X)                \
  X(dnnl_matmul_desc_init)                \
  X(dnnl_memory_desc_init_by_strides)     \
  X(dnnl_primitive_desc_iterator_create)  \
  X(dnnl_primitive_desc_iterator_destroy) \
  X(dnnl_primitive_desc_iterator_fetch)   \
  X(dnnl_primitive_desc_iterator_next)
#else
#if DNNL_VERSION_MINOR == 0
#define CUTLOSS_ONEDNN_SINCE_3_1(X)
#else
#define CUTLOSS_ONEDNN_SINCE_3_1(X) X(dnnl_memory_create_v2)
#endif
#define CUTLOSS_ONEDNN_FUNCTIONS(X)       \
  CUTLOSS_ONEDNN_COMMON(X)                \
  X(dnnl_matmul_primitive_desc_create)    \
  CUTLOSS_ONEDNN_SINCE_3_1(X)             \
  X(dnnl_memory_desc_clone)               \
  X(dnnl_memory_desc_create_with_tag)     \
  X(dnnl_memory_desc_create_with_strides) \
  X(dnnl_memory_desc_destroy)             \
  X(dnnl_primitive_desc_clone)            \
  X(dnnl_primitive_desc_next_impl)
#endif

namespace cutloss::cpu {

struct OneDnn {
#define CUTLOSS_ONEDNN_MEMBER(name) decltype(&::name) name;
  CUTLOSS_ONEDNN_FUNCTIONS(CUTLOSS_ONEDNN_MEMBER)
#undef CUTLOSS_ONEDNN_MEMBER
};

// The table, which onednn_opened.cpp or onednn_linked.cpp makes. It may be used where there is no
// onednn_refusal.
const OneDnn& onednn();

}  // namespace cutloss::cpu

// The C++ interface calls the functions by their plain names from within its namespace, where it
// finds these.
namespace dnnl {
#define CUTLOSS_ONEDNN_CALL(name)                      \
  inline constexpr auto name = [](auto... arguments) { \
    return cutloss::cpu::onednn().name(arguments...);  \
  };
CUTLOSS_ONEDNN_FUNCTIONS(CUTLOSS_ONEDNN_CALL)
#undef CUTLOSS_ONEDNN_CALL
}  // namespace dnnl

#include <oneapi/dnnl/dnnl.hpp>
