// Hopper's table of kernels.
#include "cuda/fused/kernels.h"

#include "cuda/fused/sm90/dc_and_de.h"
#include "cuda/fused/sm90/instances.h"
#include "cuda/fused/sm90/tuning.h"

namespace cutloss::cuda::fused::sm90 {
namespace {

Grid grid_for(int multiprocessors, int rows, int columns, bool may_share_rows) {
  Grid grid;
  grid.blocks = multiprocessors / 2 * 2;
  grid.largest_group = kLargestGroup;
  grid.width = kTileColumns;
  if (rows > 128 || !may_share_rows) return grid;
  // Few rows take the time of reading C. Tiles are just narrow enough that all blocks get equally
  // many.
  grid.shares_rows = true;
  const int tiles = (columns + kTileColumns * grid.blocks - 1) / (kTileColumns * grid.blocks);
  const int width = (columns + tiles * grid.blocks - 1) / (tiles * grid.blocks);
  grid.width = (width + 7) / 8 * 8;
  return grid;
}

double dc_and_de_time(int multiprocessors, std::int64_t rows, std::int64_t columns,
                      std::int64_t D) {
  const int clusters = multiprocessors / 2;
  const DcAndDe both = DcAndDe::make(static_cast<int>(rows), static_cast<int>(columns),
                                     static_cast<int>(D), clusters);
  constexpr double kStep = 2.0 * kTileRows * kTileColumns * kTileDepth;
  return static_cast<double>(both.time() * clusters) * kStep /
         (static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(D));
}

// Calls use(pointer to the element type) of logits' operands.
template <class Use>
void for_element(DType type, Use use) {
  type == DType::f16 ? use(static_cast<cute::half_t*>(nullptr))
                     : use(static_cast<cute::bfloat16_t*>(nullptr));
}

void launch_statistics(const Logits& logits, const Statistics& statistics, const Grid& grid,
                       cudaStream_t stream) {
  for_element(logits.type, [&]<class Element>(Element*) {
    const auto instance =
        grid.shares_rows ? (statistics.all ? launch_statistics_instance<Element, true, true>
                                           : launch_statistics_instance<Element, true, false>)
                         : (statistics.all ? launch_statistics_instance<Element, false, true>
                                           : launch_statistics_instance<Element, false, false>);
    instance(logits, statistics, grid, stream);
  });
}

void launch_gradient(const Logits& logits, const GradientOfLogits& gradient, const Grid& grid,
                     cudaStream_t stream) {
  for_element(logits.type, [&]<class Element>(Element*) {
    using Kind = GradientKind;
    const bool capped = logits.transform.softcap != 0.f;
    const auto instance = gradient.general
                              ? (capped ? launch_gradient_instance<Element, Kind::general_capped>
                                        : launch_gradient_instance<Element, Kind::general>)
                              : (capped ? launch_gradient_instance<Element, Kind::capped>
                                        : launch_gradient_instance<Element, Kind::plain>);
    instance(logits, gradient, grid, stream);
  });
}

}  // namespace

constinit const LogitKernels kernels{
    kTileColumns, grid_for,  launch_statistics, launch_gradient, launch_exponentials,
    launch_dc,    launch_de, launch_dc_and_de,  dc_and_de_time};

}  // namespace cutloss::cuda::fused::sm90
