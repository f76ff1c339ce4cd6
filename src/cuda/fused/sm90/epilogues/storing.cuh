// What epilogues that store their tiles have in common.
#pragma once

#include "cuda/fused/sm90/product.cuh"

namespace cutloss::cuda::fused::sm90 {

template <class GivenParams, class GivenFacts>
class StoringEpilogue {
 public:
  static constexpr int kWarpBytes = kStripBytes;

  using Params = GivenParams;
  using Facts = GivenFacts;

  __device__ StoringEpilogue(const Params& params, const CUtensorMap* out, char* buffer,
                             Facts& facts, const TileWalk&, int, int, int)
      : p_(params), out_(out), buffer_(buffer), facts_(facts) {}

  __device__ void finish() {}

 protected:
  const Params& p_;
  const CUtensorMap* out_;
  char* buffer_;
  Facts& facts_;
};

}  // namespace cutloss::cuda::fused::sm90
