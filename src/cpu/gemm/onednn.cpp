// oneDNN keeps generated code in a cache of its own, but describing a product again in order to
// look it up is work that a small product feels: finished primitives are kept, per thread.
#include <omp.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <new>
#include <string>
#include <string_view>
#include <tuple>

#include "core/refuse.h"
#include "core/text.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/onednn.h"

namespace cutloss::cpu {
namespace {

using dnnl::memory;

// Before 3.2 (2.6.3 was seen to be wrong, 3.2 is right) bf16 products on AMX can run with another
// product's tiles: the numbers are wrong, or the process dies (docs/decisions/0012).
bool amx_is_right() {
  static const bool right =
      onednn_has_right_amx(onednn().dnnl_version()->major, onednn().dnnl_version()->minor);
  return right;
}

// Switches AMX off where it is wrong. The library takes a limit only before it is first used, and
// DNNL_MAX_CPU_ISA may have set a lower one.
void leave_wrong_amx_alone() {
  static const bool done = [] {
    if (amx_is_right()) return true;
    const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (limit == nullptr) limit = std::getenv("DNNL_MAX_CPU_ISA");
    if (onednn_limit_allows_amx(limit == nullptr ? "" : limit)) {
      onednn().dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx512_core_bf16);
    }
    return true;
  }();
  static_cast<void>(done);
}

// An instruction set's bits hold those of all that it includes.
bool has_isa(dnnl::cpu_isa wanted) {
  leave_wrong_amx_alone();
  const auto there = static_cast<int>(dnnl::get_effective_cpu_isa());
  return (there & static_cast<int>(wanted)) == static_cast<int>(wanted);
}

bool has_amx() {
  static const bool there = has_isa(dnnl::cpu_isa::avx512_core_amx);
  return there;
}

const dnnl::engine& library_engine() {
  leave_wrong_amx_alone();
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& library_stream() {
  static thread_local dnnl::stream stream(library_engine());
  return stream;
}

memory::desc describe(std::int64_t rows, std::int64_t columns, const Operand& operand,
                      memory::data_type type) {
  const memory::dims strides =
      operand.transposed ? memory::dims{1, operand.stride} : memory::dims{operand.stride, 1};
  return {{rows, columns}, type, strides};
}

struct Prepared {
  memory::desc a, b, c;
  dnnl::matmul primitive;
};

// Moves on to the implementation that is built on a plain GEMM, if there is one. For the gradients'
// products in bf16 it is quicker than the library's first choice, but not with few rows, nor for
// logits, nor with AMX (there it takes 1.2 times as long, the mean of 60 products on 16 threads).
bool prefer_gemm(dnnl::matmul::primitive_desc& choice) {
  do {
    if (std::string_view(choice.impl_info_str()).starts_with("gemm")) return true;
  } while (choice.next_impl());
  return false;
}

Prepared prepare(const Product& p) {
  const auto library_type = [](DType t) {
    return t == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  };
  Prepared product;
  product.a = describe(p.M, p.K, p.a, library_type(p.type));
  product.b = describe(p.K, p.N, p.b, library_type(p.type));
  product.c = {{p.M, p.N}, library_type(p.c_type), memory::dims{p.c_stride, 1}};
  dnnl::post_ops after;
  if (p.alpha != 1) {
#if DNNL_VERSION_MAJOR < 3
    after.append_eltwise(1.0f, dnnl::algorithm::eltwise_linear, static_cast<float>(p.alpha), 0.0f);
#else
    after.append_eltwise(dnnl::algorithm::eltwise_linear, static_cast<float>(p.alpha), 0.0f);
#endif
  }
  if (p.accumulate) after.append_sum(1.0f);
  dnnl::primitive_attr attr;
  attr.set_post_ops(after);
  const auto fresh = [&] {
#if DNNL_VERSION_MAJOR < 3
    const dnnl::matmul::desc desc(product.a, product.b, product.c);
    return dnnl::matmul::primitive_desc(desc, attr, library_engine());
#else
    return dnnl::matmul::primitive_desc(library_engine(), product.a, product.b, product.c, attr);
#endif
  };
  auto choice = fresh();
  const bool gradient = p.type == DType::bf16 && !p.b.transposed;
  const bool few_rows = std::min(p.M, p.K) < 128;
  if (gradient && !few_rows && !has_amx() && !prefer_gemm(choice)) choice = fresh();
  product.primitive = dnnl::matmul(choice);
  return product;
}

// All that a primitive depends on. The number of threads is fixed in its code.
auto key_of(const Product& p) {
  return std::tuple(p.M, p.N, p.K, p.a.stride, p.a.transposed, p.b.stride, p.b.transposed,
                    p.c_stride, p.type, p.c_type, p.alpha, p.accumulate, omp_get_max_threads());
}

const Prepared& prepared(const Product& p) {
  // A training step needs about ten shapes; rows that come and go bring new ones.
  constexpr std::size_t kMost = 64;
  static thread_local std::map<decltype(key_of(p)), Prepared> known;
  const auto key = key_of(p);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= kMost) known.clear();
  return known.emplace(key, prepare(p)).first->second;
}

}  // namespace

void multiply_onednn(const Product& p) {
  try {
    const Prepared& ready = prepared(p);
    // The library takes pointers that it could write to, but it only reads the operands.
    const auto wrap = [](const memory::desc& desc, const void* data) {
      return memory(desc, library_engine(), const_cast<void*>(data));
    };
    ready.primitive.execute(library_stream(), {{DNNL_ARG_SRC, wrap(ready.a, p.a.data)},
                                               {DNNL_ARG_WEIGHTS, wrap(ready.b, p.b.data)},
                                               {DNNL_ARG_DST, wrap(ready.c, p.c)}});
    library_stream().wait();
  } catch (const dnnl::error& error) {
    const bool memory = error.status == dnnl_out_of_memory;
    throw Error(memory ? ErrorCode::out_of_memory : ErrorCode::internal,
                text("oneDNN failed at a product of ", p.M, " x ", p.N, " x ", p.K, " (",
                     name(p.type), "): ", error.what()));
  } catch (const std::bad_alloc&) {
    refuse(ErrorCode::out_of_memory, "oneDNN ran out of memory at a product of ", p.M, " x ", p.N,
           " x ", p.K);
  }
}

bool has_native_bf16() {
  // Where AMX is wrong and still on, because another part of the process has used the library
  // before, products are made in f32, which is right.
  static const bool native =
      has_isa(dnnl::cpu_isa::avx512_core_bf16) && (amx_is_right() || !has_amx());
  return native;
}

bool onednn_has_right_amx(int major, int minor) { return major > 3 || (major == 3 && minor >= 2); }

bool onednn_limit_allows_amx(std::string_view limit) {
  std::string upper(limit);
  std::transform(upper.begin(), upper.end(), upper.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::toupper(letter)); });
  return upper.empty() || upper == "ALL" || upper == "DEFAULT" ||
         upper.find("AMX") != std::string::npos;
}

bool has_avx512() { return has_isa(dnnl::cpu_isa::avx512_core); }

std::string describe_onednn() {
  const dnnl_version_t* v = onednn().dnnl_version();
  const bool amx_off = !amx_is_right() && !has_amx();
  const char* bf16 = has_native_bf16()              ? "bf16 products"
                     : !amx_is_right() && has_amx() ? "bf16 widened to f32 (its products are wrong "
                                                      "with AMX before 3.2, and it was in use "
                                                      "before AMX could be switched off)"
                                                    : "bf16 widened to f32 (no AVX512_BF16)";
  return text("oneDNN ", v->major, ".", v->minor, ".", v->patch,
              amx_off ? " without AMX (wrong there before 3.2)" : "", ", ", bf16);
}

}  // namespace cutloss::cpu
