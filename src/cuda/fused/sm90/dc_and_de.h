// How dC's and dE's products share one kernel: what the kernel goes by, and plans foretell.
#pragma once

#include "cuda/fused/sm90/tuning.h"
#include "cuda/fused/tile_walk.h"

namespace cutloss::cuda::fused::sm90 {

// What the epilogue of a tile takes beyond what other tiles' products hide, in steps of kTileDepth.
inline constexpr int kStepsOfEpilogue = 2;

struct DcAndDe {
  TwoWalks walk;
  int dc_steps, de_steps;  // of a tile

  // A slab of so many columns, of so many rows that count.
  CUTLOSS_WALK static DcAndDe make(int rows, int columns, int D, int clusters) {
    const auto walk = [&](int of) {
      return TileWalk::make(up(of, 2 * kTileRows), up(D, kTileColumns), clusters, 1);
    };
    const int dc_steps = up(rows, kTileDepth), de_steps = up(columns, kTileDepth);
    return {TwoWalks::make(walk(rows > 0 ? columns : 0), walk(rows), dc_steps + kStepsOfEpilogue,
                           de_steps + kStepsOfEpilogue),
            dc_steps, de_steps};
  }

  // Until the last cluster ends, in steps.
  CUTLOSS_WALK std::int64_t time() const {
    return walk.time(dc_steps + kStepsOfEpilogue, de_steps + kStepsOfEpilogue);
  }

 private:
  CUTLOSS_WALK static int up(int extent, int unit) { return (extent + unit - 1) / unit; }
};

}  // namespace cutloss::cuda::fused::sm90
