// Forward keeps nothing but the statistics, backward makes the logits once more, a slab of columns
// at a time. Four products, the least memory.
#include "cuda/library/session.h"

namespace cutloss::cuda::library {
namespace {

template <class T>
class ByVocabularySession final : public LibrarySession<T> {
 public:
  using LibrarySession<T>::LibrarySession;

 private:
  void make_statistics(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.make_statistics(parts.chunk(chunk), /*keep=*/false);
  }
  void make_gradients(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.make_gradients(parts.chunk(chunk), /*from_kept=*/false);
  }
};

}  // namespace

const Algorithm& by_vocabulary() {
  static const LibraryAlgorithm<ByVocabularySession> algorithm("cuda/library/by_vocabulary",
                                                               {Schedule::vocabulary, false});
  return algorithm;
}

}  // namespace cutloss::cuda::library
