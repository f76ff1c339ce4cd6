// The statistics alone: logits are made slab by slab and forgotten. One product.
#include "cpu/algorithms/algorithms.h"
#include "cpu/algorithms/session.h"

namespace cutloss::cpu {
namespace {

template <class T>
class ForwardSession final : public CpuSession<T> {
 public:
  using CpuSession<T>::CpuSession;

 private:
  void make_statistics(std::int64_t chunk) override {
    this->parts.statistics.make(this->parts.chunk(chunk), nullptr);
  }
};

}  // namespace

const Algorithm& forward_algorithm() {
  static const CpuAlgorithm<ForwardSession> algorithm("cpu/forward", {Schedule::none, false});
  return algorithm;
}

}  // namespace cutloss::cpu
