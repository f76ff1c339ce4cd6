// dC of a chunk of rows: added to, or first written to, fp32 sums in device memory.
#pragma once

#include "cuda/sm90/product.cuh"

namespace cutloss::sm90 {

class AccumulateEpilogue {
 public:
  static constexpr int kWarpBytes = kStripBytes;

  struct Facts {};

  struct Params {
    bool add = false;  // else the sums are overwritten
  };

  __device__ AccumulateEpilogue(const Params& params, const CUtensorMap* out, char* buffer, Facts&,
                                const TileWalk&, int, int, int)
      : p_(params), out_(out), buffer_(buffer) {}

  __device__ void prepare(int, int, int, int) {}

  template <class Sums>
  __device__ __forceinline__ void tile(Sums& sums, TilePosition, int first_row, int first_column,
                                       int, int) {
    const Lane at;
    CUTE_UNROLL
    for (int m = 0; m < kTileRows / 64; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < kTileColumns / 32; ++h) {
        ptx::wait_stores_read<0>();
        __syncwarp();
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            const int row = r * 8 + at.lane / 4;
            const int chunk = j * 2 + at.lane % 4 / 2;  // of 16 bytes
            char* to = buffer_ + row * 128 + ((chunk ^ (row % 8)) * 16) + (at.lane & 1) * 8;
            const auto z = row_of(sums, 2 * m + r);
            *reinterpret_cast<float2*>(to) =
                make_float2(z[(h * 4 + j) * 2], z[(h * 4 + j) * 2 + 1]);
          }
        }
        ptx::fence_async_proxy();
        __syncwarp();
        if (at.lane == 0) {
          const int row = first_row + m * 64 + at.warp * 16, column = first_column + h * 32;
          if (p_.add) {
            ptx::add_tile(out_, buffer_, column, row);
          } else {
            ptx::store_tile(out_, buffer_, column, row);
          }
          ptx::commit_stores();
        }
      }
    }
  }

  __device__ void finish() {}

 private:
  const Params& p_;
  const CUtensorMap* out_;
  char* buffer_;
};

}  // namespace cutloss::sm90
