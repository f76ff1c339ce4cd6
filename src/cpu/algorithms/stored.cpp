// Forward keeps the logits of all rows, backward makes the gradients of them. Three products.
#include "cpu/algorithms/algorithms.h"
#include "cpu/algorithms/session.h"

namespace cutloss::cpu {
namespace {

template <class T>
class StoredSession final : public CpuSession<T> {
 public:
  using CpuSession<T>::CpuSession;

 private:
  void make_statistics(std::int64_t chunk) override {
    this->parts.statistics.make(this->parts.chunk(chunk), &this->parts.kept);
  }
  void make_gradients(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.add_gradients(parts.chunk(chunk), [&](const Block& block) {
      return parts.gradient.from_kept(block, parts.kept);
    });
  }
};

}  // namespace

const Algorithm& stored() {
  static const CpuAlgorithm<StoredSession> algorithm("cpu/stored", {Schedule::rows, true});
  return algorithm;
}

}  // namespace cutloss::cpu
