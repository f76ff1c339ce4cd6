// The epilogue of dC's and dE's products. It adds the sums to fp32 numbers in device memory, or
// writes them there first; where one product makes all of dC, it writes 16 bits. By rows it adds
// the targets' part of dC on the way.
#pragma once

#include <type_traits>

#include "cuda/fused/sm90/epilogues/storing.cuh"

namespace cutloss::cuda::fused::sm90 {

struct AccumulateParams {
  bool add;  // possible with fp32 alone; without it the output is overwritten
  float scale;
  const int* sum_of_row;  // null where there are no sums to add
  const float* sums;
  int sums_stride;
};

struct AccumulateFacts {
  int sum[kTileRows];  // the row of `sums` that belongs to the tile's row, or -1
};

template <class Out>
class AccumulateEpilogue : public StoringEpilogue<AccumulateParams, AccumulateFacts> {
 public:
  using StoringEpilogue::StoringEpilogue;

  // This is needed only where there are sums to add.
  __device__ __forceinline__ void prepare(int first_row, int, int rows, int) {
    const int thread = threadIdx.x % 128;
    const int row = first_row + thread;
    const bool has = p_.sum_of_row != nullptr && row < rows;
    facts_.sum[thread] = has ? __ldg(p_.sum_of_row + row) : -1;
  }

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition, int first_row, int first_column,
                                       int, int last_column) {
    const Lane at;
    CUTE_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      const auto z = row_of(sums, i);
      if (p_.scale != 1.f) {
        CUTE_UNROLL
        for (int k = 0; k < kRowSums; ++k) z[k] *= p_.scale;
      }
      if (p_.sum_of_row != nullptr) {
        add_sum(z, facts_.sum[at.row(i)], first_column, last_column);
      }
    }
    CUTE_UNROLL
    for (int m = 0; m < kTileRows / 64; ++m) {
      const int row = first_row + m * 64 + at.warp * 16;
      if constexpr (std::is_same_v<Out, float>) {
        CUTE_UNROLL
        for (int h = 0; h < kTileColumns / 32; ++h) {
          store_fp32(sums, m, h, row, first_column + h * 32);
        }
      } else {
        CUTE_UNROLL
        for (int h = 0; h < kTileColumns / 64; ++h) {
          store_strip(sums, m, h, out_, buffer_, row, first_column + h * 64,
                      [](float low, float high) { return ptx::pack_bf16(low, high); });
        }
      }
    }
  }

 private:
  template <class Row>
  __device__ __forceinline__ void add_sum(Row z, int sum, int first_column, int last_column) {
    if (!__any_sync(~0u, sum >= 0)) return;  // most rows have no sum
    const int own = threadIdx.x % 4 * 2;     // the thread's first column
    const int columns = sum >= 0 ? last_column - first_column - own : 0;
    const float* from = p_.sums + std::int64_t{sum} * p_.sums_stride + first_column + own;
    CUTE_UNROLL
    for (int k = 0; k < kRowSums; k += 2) {
      float2 pair = make_float2(0.f, 0.f);
      if (k * 4 < columns) pair = __ldg(reinterpret_cast<const float2*>(from + k * 4));
      z[k] += pair.x;
      z[k + 1] += pair.y;
    }
  }

  // Stores 16 rows of a warp, 32 columns.
  template <class Sums>
  __device__ __forceinline__ void store_fp32(Sums& sums, int m, int h, int row, int column) {
    const Lane at;
    ptx::wait_stores_read<0>();
    __syncwarp();
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int strip_row = r * 8 + at.lane / 4;
        const int chunk = j * 2 + at.lane % 4 / 2;  // of 16 bytes
        char* to = buffer_ + strip_row * 128 + ((chunk ^ (strip_row % 8)) * 16) + (at.lane & 1) * 8;
        const auto z = row_of(sums, 2 * m + r);
        *reinterpret_cast<float2*>(to) = make_float2(z[(h * 4 + j) * 2], z[(h * 4 + j) * 2 + 1]);
      }
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (at.lane != 0) return;
    if (p_.add) {
      ptx::add_tile(out_, buffer_, column, row);
    } else {
      ptx::store_tile(out_, buffer_, column, row);
    }
    ptx::commit_stores();
  }
};

}  // namespace cutloss::cuda::fused::sm90
