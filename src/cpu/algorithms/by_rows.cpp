// A chunk of rows at a time: its statistics, its logits kept as exponentials, then its gradients of
// them, which may depend on the statistics. Three products.
#include "cpu/algorithms/algorithms.h"
#include "cpu/algorithms/session.h"

namespace cutloss::cpu {
namespace {

template <class T>
class ByRowsSession final : public CpuSession<T> {
 public:
  using CpuSession<T>::CpuSession;

 private:
  // Forward alone, an evaluation between training steps, keeps nothing.
  void make_statistics(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.statistics.make(parts.chunk(chunk), this->pass() == Pass::both ? &parts.kept : nullptr);
  }
  void make_gradients(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.add_gradients(parts.chunk(chunk), [&](const Block& block) {
      return parts.gradient.from_kept(block, parts.kept);
    });
  }
};

}  // namespace

const Algorithm& by_rows() {
  static const CpuAlgorithm<ByRowsSession> algorithm("cpu/by_rows", {Schedule::rows, false});
  return algorithm;
}

}  // namespace cutloss::cpu
