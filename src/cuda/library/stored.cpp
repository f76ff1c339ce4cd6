// Forward keeps the logits of all rows, backward makes the gradients of them. Three products.
#include "cuda/library/session.h"

namespace cutloss::cuda::library {
namespace {

template <class T>
class StoredSession final : public LibrarySession<T> {
 public:
  using LibrarySession<T>::LibrarySession;

 private:
  void make_statistics(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.make_statistics(parts.chunk(chunk), /*keep=*/true);
  }
  void make_gradients(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.make_gradients(parts.chunk(chunk), /*from_kept=*/true);
  }
};

}  // namespace

const Algorithm& stored() {
  static const LibraryAlgorithm<StoredSession> algorithm("cuda/library/stored",
                                                         {Schedule::rows, true});
  return algorithm;
}

}  // namespace cutloss::cuda::library
