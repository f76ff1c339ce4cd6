// A chunk of rows at a time: its statistics, its logits kept as exponentials, then its gradients of
// them, which may depend on the statistics. Three products. Forward alone, an evaluation between
// training steps, keeps nothing.
#include "cuda/library/session.h"

namespace cutloss::cuda::library {
namespace {

template <class T>
class ByRowsSession final : public LibrarySession<T> {
 public:
  using LibrarySession<T>::LibrarySession;

 private:
  void make_statistics(std::int64_t chunk) override {
    auto& parts = this->parts;
    parts.make_statistics(parts.chunk(chunk), /*keep=*/this->pass() == Pass::both);
  }
  void make_gradients(std::int64_t chunk) override {
    auto& parts = this->parts;
    const RowRange range = parts.chunk(chunk);
    if (parts.call.reads.whole_e) parts.operands.e_is_packed(range);
    parts.make_gradients(range, /*from_kept=*/true);
  }
};

}  // namespace

const Algorithm& by_rows() {
  static const LibraryAlgorithm<ByRowsSession> algorithm("cuda/library/by_rows",
                                                         {Schedule::rows, false});
  return algorithm;
}

}  // namespace cutloss::cuda::library
