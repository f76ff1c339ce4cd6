// The matrix library's products, of the kinds that the CPU engine asks for, against sums in fp64:
// odd and even sizes, few columns and many, on as many threads as there are. oneDNN 2.6 is wrong at
// K = 63 on processors with AMX.
#include <cmath>
#include <limits>
#include <random>

#include "cpu/gemm/gemm.h"
#include "engines.h"

namespace cutloss::test {
namespace {

struct Kind {
  const char* name;
  bool a_transposed, b_transposed;  // as it lies in memory
};
constexpr Kind kKinds[] = {{"logits", false, true}, {"dE", false, false}, {"dC", true, false}};
constexpr std::int64_t kRows[] = {1, 17, 63, 64, 129, 257};           // M
constexpr std::int64_t kColumns[] = {1, 33, 64, 511};                 // N
constexpr std::int64_t kInner[] = {1, 31, 33, 45, 63, 65, 127, 129};  // K

class Products : public testing::TestWithParam<std::tuple<DType, Kind>> {};

// ||c - exact||_F / (||a||_F ||b||_F), which is at most the accumulator's rounding error times K.
double error_of(const cpu::Product& p, const Array& a, const Array& b, const Array& before,
                const Array& c) {
  double difference = 0, norm_a = 0, norm_b = 0;
  const auto at = [](const Array& matrix, bool transposed, std::int64_t rows, std::int64_t columns,
                     std::int64_t i, std::int64_t j) {
    return matrix.get(transposed ? j * rows + i : i * columns + j);
  };
  for (std::int64_t m = 0; m < p.M; ++m) {
    for (std::int64_t n = 0; n < p.N; ++n) {
      double sum = p.accumulate ? before.get(m * p.N + n) : 0;
      for (std::int64_t k = 0; k < p.K; ++k) {
        sum +=
            p.alpha * at(a, p.a.transposed, p.M, p.K, m, k) * at(b, p.b.transposed, p.K, p.N, k, n);
      }
      difference += std::pow(c.get(m * p.N + n) - sum, 2);
    }
  }
  for (std::int64_t i = 0; i < p.M * p.K; ++i) norm_a += std::pow(a.get(i), 2);
  for (std::int64_t i = 0; i < p.K * p.N; ++i) norm_b += std::pow(b.get(i), 2);
  return std::sqrt(difference / (norm_a * norm_b));
}

TEST_P(Products, Right) {
  const auto [type, kind] = GetParam();
  if (type != DType::f64 && !cpu::onednn_refusal().empty()) GTEST_SKIP() << cpu::onednn_refusal();
  if (type == DType::bf16 && !cpu::has_native_bf16()) GTEST_SKIP() << "no bf16 products here";
  const DType sums = type == DType::f64 ? DType::f64 : DType::f32;
  const double eps = type == DType::f64 ? std::numeric_limits<double>::epsilon()
                                        : std::numeric_limits<float>::epsilon();
  std::mt19937_64 random(11);
  for (const std::int64_t K : kInner) {
    for (const std::int64_t N : kColumns) {
      for (const std::int64_t M : kRows) {
        const Array a = detail::random_array(type, M * K, -1, 1, random);
        const Array b = detail::random_array(type, K * N, -1, 1, random);
        const Array before = detail::random_array(sums, M * N, -1, 1, random);
        Array c(sums, M * N);
        for (std::int64_t i = 0; i < M * N; ++i) c.set(i, before.get(i));
        cpu::Product p{};
        p.M = M, p.N = N, p.K = K;
        p.a = {a.pointer(), kind.a_transposed ? M : K, kind.a_transposed};
        p.b = {b.pointer(), kind.b_transposed ? K : N, kind.b_transposed};
        p.c = c.pointer();
        p.c_stride = N;
        p.type = type;
        p.c_type = sums;
        p.alpha = 0.5;
        p.accumulate = !kind.b_transposed;
        cpu::multiply(p);
        // K roundings of a sum whose terms are at most 1, and the one of what was there before.
        EXPECT_LE(error_of(p, a, b, before, c), 4 * (static_cast<double>(K) + 8) * eps)
            << kind.name << ", " << M << " x " << N << " x " << K;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Products,
                         testing::Combine(testing::Values(DType::f32, DType::bf16, DType::f64),
                                          testing::ValuesIn(kKinds)),
                         [](const auto& info) {
                           return std::string(name(std::get<0>(info.param))) + "_" +
                                  std::get<1>(info.param).name;
                         });

TEST(OneDnn, AmxIsLeftAloneBefore3_2) {
  EXPECT_FALSE(cpu::onednn_has_right_amx(2, 6));
  EXPECT_FALSE(cpu::onednn_has_right_amx(3, 1));
  EXPECT_TRUE(cpu::onednn_has_right_amx(3, 2));
  EXPECT_TRUE(cpu::onednn_has_right_amx(4, 0));
}

TEST(OneDnn, LimitsThatAllowAmx) {
  for (const char* limit : {"", "ALL", "default", "AVX512_CORE_AMX", "avx512_core_amx_fp16"}) {
    EXPECT_TRUE(cpu::onednn_limit_allows_amx(limit)) << limit;
  }
  for (const char* limit : {"AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "sse41"}) {
    EXPECT_FALSE(cpu::onednn_limit_allows_amx(limit)) << limit;
  }
}

}  // namespace
}  // namespace cutloss::test
