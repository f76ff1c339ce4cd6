#include "cuda/cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "core/dtype.h"
#include "core/text.h"
#include "cuda/device.h"

namespace cutloss::cuda {
namespace {

// The library's functions that are called: a member's name, and the function's behind cublasLt.
#define CUTLOSS_CUBLASLT_FUNCTIONS(X)             \
  X(create, Create)                               \
  X(version, GetVersion)                          \
  X(matmul, Matmul)                               \
  X(heuristic, MatmulAlgoGetHeuristic)            \
  X(desc_create, MatmulDescCreate)                \
  X(desc_destroy, MatmulDescDestroy)              \
  X(desc_set, MatmulDescSetAttribute)             \
  X(layout_create, MatrixLayoutCreate)            \
  X(layout_destroy, MatrixLayoutDestroy)          \
  X(preference_create, MatmulPreferenceCreate)    \
  X(preference_destroy, MatmulPreferenceDestroy)  \
  X(preference_set, MatmulPreferenceSetAttribute) \
  X(status_text, GetStatusString)

// The functions, found by name. Their types are the header's.
struct Library {
#define CUTLOSS_CUBLASLT_MEMBER(member, name) decltype(&cublasLt##name) member = nullptr;
  CUTLOSS_CUBLASLT_FUNCTIONS(CUTLOSS_CUBLASLT_MEMBER)
#undef CUTLOSS_CUBLASLT_MEMBER
  std::string refusal;  // the reason why it is not there, or empty
};

void* open_library() {
  constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  for (const int only_if_loaded : {RTLD_NOLOAD, 0}) {
    for (const char* name : kNames) {
      if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | only_if_loaded)) return handle;
    }
  }
  return nullptr;
}

Library load() {
  Library library;
  void* handle = open_library();
  if (handle == nullptr) {
    library.refusal =
        "cuBLASLt was not found: neither libcublasLt.so.13 nor libcublasLt.so.12 could be opened; "
        "put the directory of one into LD_LIBRARY_PATH";
    return library;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
    if (function == nullptr) library.refusal = text("cuBLASLt has no function ", name);
  };
#define CUTLOSS_CUBLASLT_FIND(member, name) find(library.member, "cublasLt" #name);
  CUTLOSS_CUBLASLT_FUNCTIONS(CUTLOSS_CUBLASLT_FIND)
#undef CUTLOSS_CUBLASLT_FIND
  return library;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

void check(cublasStatus_t status, const std::string& action) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const ErrorCode code = status == CUBLAS_STATUS_ALLOC_FAILED    ? ErrorCode::out_of_memory
                         : status == CUBLAS_STATUS_NOT_SUPPORTED ? ErrorCode::unsupported
                                                                 : ErrorCode::internal;
  throw Error(code, text("cuBLASLt failed at ", action, ": ", library().status_text(status),
                         " (status ", static_cast<int>(status), ")"));
}

std::string describe(const Product& p) {
  return text("a product of ", p.M, " x ", p.N, " x ", p.K, " (", name(p.type), " to ",
              name(p.c_type), ")");
}

// The handle of a device. Handles live as long as the process.
cublasLtHandle_t handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr) check(library().create(&handle), "its start");
  return handle;
}

cudaDataType_t library_type(DType type) {
  return type == DType::f64    ? CUDA_R_64F
         : type == DType::f32  ? CUDA_R_32F
         : type == DType::bf16 ? CUDA_R_16BF
                               : CUDA_R_16F;
}

// The library's own objects are released with the product that holds them.
template <class Object, class Destroy>
auto owned(Object object, Destroy destroy) {
  return std::unique_ptr<std::remove_pointer_t<Object>, Destroy>(object, destroy);
}
using OwnedDesc = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulDesc_t>,
                                  decltype(&cublasLtMatmulDescDestroy)>;
using OwnedLayout = std::unique_ptr<std::remove_pointer_t<cublasLtMatrixLayout_t>,
                                    decltype(&cublasLtMatrixLayoutDestroy)>;

// A product as it is described to the library, with the algorithm that the library chose.
struct Prepared {
  OwnedDesc desc;
  OwnedLayout a, b, c;
  cublasLtMatmulAlgo_t algorithm;
};

// Describes a row-major matrix. The library takes matrices column by column, so to it ours is the
// transposed one. It therefore computes c^T = b^T a^T, and its first operand is our second.
OwnedLayout layout_of(std::int64_t rows, std::int64_t columns, std::int64_t stride, DType type) {
  cublasLtMatrixLayout_t layout = nullptr;
  check(library().layout_create(&layout, library_type(type), static_cast<std::uint64_t>(columns),
                                static_cast<std::uint64_t>(rows), stride),
        "the description of a matrix");
  return owned(layout, library().layout_destroy);
}

// The largest power of two, up to 256, that divides an address.
std::uint32_t alignment(const void* address) {
  const auto bits = reinterpret_cast<std::uintptr_t>(address) | 256;
  return static_cast<std::uint32_t>(bits & (~bits + 1));
}

std::shared_ptr<const Prepared> prepare(const Product& p, cublasLtHandle_t handle) {
  const bool wide = p.type == DType::f64;
  const cublasComputeType_t compute = wide ? CUBLAS_COMPUTE_64F
                                      : p.type == DType::f32 && p.tf32
                                          ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F;
  cublasLtMatmulDesc_t raw_desc = nullptr;
  check(library().desc_create(&raw_desc, compute, wide ? CUDA_R_64F : CUDA_R_32F), "a description");
  OwnedDesc desc = owned(raw_desc, library().desc_destroy);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check(library().desc_set(desc.get(), attribute, &value, sizeof(value)), "an attribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, p.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, p.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (p.device_alpha != nullptr) {
    set(CUBLASLT_MATMUL_DESC_POINTER_MODE, static_cast<std::int32_t>(CUBLASLT_POINTER_MODE_DEVICE));
  }
  OwnedLayout b = p.b.transposed ? layout_of(p.N, p.K, p.b.stride, p.type)
                                 : layout_of(p.K, p.N, p.b.stride, p.type);
  OwnedLayout a = p.a.transposed ? layout_of(p.K, p.M, p.a.stride, p.type)
                                 : layout_of(p.M, p.K, p.a.stride, p.type);
  OwnedLayout c = layout_of(p.M, p.N, p.c_stride, p.c_type);

  cublasLtMatmulPreference_t raw_preference = nullptr;
  check(library().preference_create(&raw_preference), "a preference");
  const auto preference = owned(raw_preference, library().preference_destroy);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(library().preference_set(preference.get(), attribute, &value, sizeof(value)),
          "a preference");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(p.workspace_bytes));
  // Partial sums over a split K are joined in fp32 and in a fixed order.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.b.data));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.a.data));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.c));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.c));

  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  check(library().heuristic(handle, desc.get(), b.get(), a.get(), c.get(), c.get(),
                            preference.get(), 1, &best, &found),
        "the choice of an algorithm for " + describe(p));
  if (found == 0) check(CUBLAS_STATUS_NOT_SUPPORTED, describe(p));
  return std::make_shared<Prepared>(
      Prepared{std::move(desc), std::move(a), std::move(b), std::move(c), best.algo});
}

// All that the choice of an algorithm depends on.
auto key_of(const Product& p, int device) {
  return std::tuple(device, p.M, p.N, p.K, p.a.stride, p.a.transposed, p.b.stride, p.b.transposed,
                    p.c_stride, p.type, p.c_type, p.tf32, p.device_alpha != nullptr,
                    p.workspace_bytes, alignment(p.a.data), alignment(p.b.data), alignment(p.c));
}

std::shared_ptr<const Prepared> prepared(const Product& p, int device) {
  // A training step needs about ten shapes; rows that come and go bring new ones.
  constexpr std::size_t kMost = 1024;
  static std::mutex mutex;
  static std::map<decltype(key_of(p, 0)), std::shared_ptr<const Prepared>> known;
  const auto key = key_of(p, device);
  {
    const std::lock_guard lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  auto fresh = prepare(p, handle_of(device));
  const std::lock_guard lock(mutex);
  if (known.size() >= kMost) known.clear();
  return known.emplace(key, std::move(fresh)).first->second;
}

void run(const Product& p, cudaStream_t stream) {
  const int device = current_device().index;
  const auto ready = prepared(p, device);
  const bool wide = p.type == DType::f64;
  const double wide_scalars[2] = {p.alpha, p.accumulate ? 1.0 : 0.0};
  const float scalars[2] = {static_cast<float>(p.alpha), p.accumulate ? 1.0f : 0.0f};
  const void* alpha = wide ? static_cast<const void*>(&wide_scalars[0]) : &scalars[0];
  const void* beta = wide ? static_cast<const void*>(&wide_scalars[1]) : &scalars[1];
  if (p.device_alpha != nullptr) {
    const auto* there = static_cast<const DeviceScalars*>(p.device_alpha);
    alpha = &there->alpha;
    beta = p.accumulate ? &there->one : &there->zero;
  }
  check(library().matmul(handle_of(device), ready->desc.get(), alpha, p.b.data, ready->b.get(),
                         p.a.data, ready->a.get(), beta, p.c, ready->c.get(), p.c, ready->c.get(),
                         &ready->algorithm, p.workspace,
                         static_cast<std::size_t>(p.workspace_bytes), stream),
        describe(p));
}

// The part of an operand from a row and a column on, counted as the product reads it.
Operand part_of(const Operand& o, DType type, std::int64_t row, std::int64_t column) {
  const std::int64_t elements = o.transposed ? column * o.stride + row : row * o.stride + column;
  return {at(o.data, type, elements), o.stride, o.transposed};
}

// Whether a product gains by being split into one of even extents and a small rest. The tensor
// cores' quick kernels need extents along which an operand is contiguous to be multiples of 16
// bytes (cuBLAS's guide, "Tensor Core Usage"); with others the library takes a kernel that is many
// times slower. V is often odd (50257).
bool gains_by_parts(const Product& p) {
  constexpr std::int64_t kWorthIt = std::int64_t{1} << 22;  // multiplications
  return (p.type == DType::bf16 || p.type == DType::f16) && p.M * p.N * p.K >= kWorthIt;
}

}  // namespace

void multiply(const Product& p, cudaStream_t stream) {
  constexpr std::int64_t kUnit = 8;
  const auto whole = [](std::int64_t extent) { return extent / kUnit * kUnit; };
  const auto splits = [&](std::int64_t extent) { return extent > kUnit && extent % kUnit != 0; };
  const bool k_is_contiguous = !p.a.transposed || p.b.transposed;
  const bool sums_keep_digits = p.c_type == DType::f32;
  Product first = p, rest = p;
  if (!gains_by_parts(p)) {
    run(p, stream);
    return;
  }
  if (k_is_contiguous && sums_keep_digits && splits(p.K)) {
    first.K = whole(p.K);
    rest.K = p.K - first.K;
    rest.a = part_of(p.a, p.type, 0, first.K);
    rest.b = part_of(p.b, p.type, first.K, 0);
    rest.accumulate = true;
  } else if (splits(p.N)) {
    first.N = whole(p.N);
    rest.N = p.N - first.N;
    rest.b = part_of(p.b, p.type, 0, first.N);
    rest.c = at(p.c, p.c_type, first.N);
  } else if (p.a.transposed && splits(p.M)) {
    first.M = whole(p.M);
    rest.M = p.M - first.M;
    rest.a = part_of(p.a, p.type, first.M, 0);
    rest.c = at(p.c, p.c_type, first.M * p.c_stride);
  } else {
    run(p, stream);
    return;
  }
  multiply(first, stream);
  run(rest, stream);
}

std::string cublaslt_refusal() {
  if (!library().refusal.empty()) return library().refusal;
  try {
    handle_of(current_device().index);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

std::string describe_cublaslt() {
  if (!library().refusal.empty()) return library().refusal;
  const std::size_t version = library().version();  // 130101: 13.1.1
  return text("cuBLASLt ", version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace cutloss::cuda
