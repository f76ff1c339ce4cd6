// One instance of forward's kernel a file: they compile side by side.
#include "cuda/sm90/statistics_launch.cuh"

namespace cutloss::sm90 {
CUTLOSS_STATISTICS_INSTANCE(cute::bfloat16_t, Share::rows, true)
}  // namespace cutloss::sm90
