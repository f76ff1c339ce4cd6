// Forward keeps nothing but the statistics, backward makes the logits once more, a slab of columns
// at a time. Four products, the least memory.
#include "cpu/algorithms/algorithms.h"
#include "cpu/algorithms/session.h"

namespace cutloss::cpu {
namespace {

template <class T>
class ByVocabularySession final : public CpuSession<T> {
 public:
  using CpuSession<T>::CpuSession;

 private:
  void make_statistics(std::int64_t chunk) override {
    this->parts.statistics.make(this->parts.chunk(chunk), nullptr);
  }
  void make_gradients(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.add_gradients(parts.chunk(chunk),
                        [&](const Block& block) { return parts.gradient.from_product(block); });
  }
};

}  // namespace

const Algorithm& by_vocabulary() {
  static const CpuAlgorithm<ByVocabularySession> algorithm("cpu/by_vocabulary",
                                                           {Schedule::vocabulary, false});
  return algorithm;
}

}  // namespace cutloss::cpu
