#include "cuda/sm90/gradient_launch.cuh"

namespace cutloss::sm90 {
CUTLOSS_GRADIENT_INSTANCE(cute::half_t, GradientKind::general_capped)
}  // namespace cutloss::sm90
