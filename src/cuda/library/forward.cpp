// The statistics alone: logits are made slab by slab and forgotten. One product.
#include "cuda/library/session.h"

namespace cutloss::cuda::library {
namespace {

template <class T>
class ForwardSession final : public LibrarySession<T> {
 public:
  using LibrarySession<T>::LibrarySession;

 private:
  void make_statistics(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.make_statistics(parts.chunk(chunk), /*keep=*/false);
  }
};

}  // namespace

const Algorithm& forward_algorithm() {
  static const LibraryAlgorithm<ForwardSession> algorithm("cuda/library/forward",
                                                          {Schedule::none, false});
  return algorithm;
}

}  // namespace cutloss::cuda::library
