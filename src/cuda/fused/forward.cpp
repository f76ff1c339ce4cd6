// The statistics alone. One product.
#include "cuda/fused/components.h"
#include "cuda/fused/statistics.h"

namespace cutloss::cuda::fused {
namespace {

class ForwardSession final : public FusedSession {
 public:
  using FusedSession::FusedSession;

 private:
  void make_statistics(std::int64_t chunk) override {
    fused::make_statistics(parts, parts.chunk(chunk));
  }
};

}  // namespace

const Algorithm& forward_algorithm() {
  static const FusedAlgorithm<ForwardSession> algorithm("cuda/fused/forward",
                                                        {Schedule::none, false});
  return algorithm;
}

}  // namespace cutloss::cuda::fused
