// Primitives are made for each call: oneDNN's own cache makes that cheap for shapes it has seen
// (it keys on the number of threads as well).
#include <new>
#include <oneapi/dnnl/dnnl.hpp>

#include "core/text.h"
#include "cpu/gemm.h"

namespace cutloss::cpu {
namespace {

using dnnl::memory;

const dnnl::engine& library_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& library_stream() {
  static thread_local dnnl::stream stream(library_engine());
  return stream;
}

memory::desc describe(std::int64_t rows, std::int64_t columns, const Operand& operand,
                      memory::data_type type) {
  const memory::dims strides = operand.transposed ? memory::dims{1, operand.stride}
                                                  : memory::dims{operand.stride, 1};
  return {{rows, columns}, type, strides};
}

dnnl::matmul make_primitive(const memory::desc& a, const memory::desc& b, const memory::desc& c,
                            const dnnl::primitive_attr& attr) {
#if DNNL_VERSION_MAJOR < 3
  return dnnl::matmul(
      dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, c), attr, library_engine()));
#else
  return dnnl::matmul(dnnl::matmul::primitive_desc(library_engine(), a, b, c, attr));
#endif
}

}  // namespace

void multiply_onednn(const Product& p) {
  try {
    const auto library_type = [](DType t) {
      return t == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
    };
    const auto type = library_type(p.type);
    const memory::desc a = describe(p.M, p.K, p.a, type);
    const memory::desc b = describe(p.K, p.N, p.b, type);
    const memory::desc c = {{p.M, p.N}, library_type(p.c_type), memory::dims{p.c_stride, 1}};
    dnnl::post_ops after;
    if (p.alpha != 1) {
#if DNNL_VERSION_MAJOR < 3
      after.append_eltwise(1.0f, dnnl::algorithm::eltwise_linear, static_cast<float>(p.alpha),
                           0.0f);
#else
      after.append_eltwise(dnnl::algorithm::eltwise_linear, static_cast<float>(p.alpha), 0.0f);
#endif
    }
    if (p.accumulate) after.append_sum(1.0f);
    dnnl::primitive_attr attr;
    attr.set_post_ops(after);

    // The library takes pointers it may write to; operands are only read.
    const auto wrap = [](const memory::desc& desc, const void* data) {
      return memory(desc, library_engine(), const_cast<void*>(data));
    };
    make_primitive(a, b, c, attr)
        .execute(library_stream(), {{DNNL_ARG_SRC, wrap(a, p.a.data)},
                                    {DNNL_ARG_WEIGHTS, wrap(b, p.b.data)},
                                    {DNNL_ARG_DST, wrap(c, p.c)}});
    library_stream().wait();
  } catch (const dnnl::error& error) {
    const bool memory = error.status == dnnl_out_of_memory;
    throw Error(memory ? ErrorCode::out_of_memory : ErrorCode::internal,
                text("oneDNN failed at a product of ", p.M, " x ", p.N, " x ", p.K, " (",
                     name(p.type), "): ", error.what()));
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, text("oneDNN ran out of memory at a product of ", p.M,
                                               " x ", p.N, " x ", p.K));
  }
}

bool has_native_bf16() {
  // The library's instruction sets are ordered; avx512_core_bf16 lies above plain AVX-512.
  static const bool native = [] {
    const auto isa = static_cast<int>(dnnl::get_effective_cpu_isa());
    const auto bf16 = static_cast<int>(dnnl::cpu_isa::avx512_core_bf16);
    return (isa & bf16) == bf16;
  }();
  return native;
}

std::string describe_onednn() {
  const dnnl_version_t* v = dnnl_version();
  return text("oneDNN ", v->major, ".", v->minor, ".", v->patch,
              has_native_bf16() ? ", bf16 products" : ", bf16 widened to f32 (no AVX512_BF16)");
}

}  // namespace cutloss::cpu
