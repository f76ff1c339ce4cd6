// What an algorithm has decided for a problem: all that its sessions need beside the pointers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/ledger.h"
#include "core/ranges.h"
#include "core/sizes.h"
#include "cutloss/problem.h"

namespace cutloss {

class Algorithm;

// How many rows and columns are taken at a time.
struct Sizes {
  // Rows whose statistics are made together: all of them, or a chunk whose logits are kept.
  std::int64_t chunk_rows = 1;
  // Rows and columns of one product of logits.
  std::int64_t block_rows = 1;
  std::int64_t slab = 1;
  // The same of the gradients' products.
  std::int64_t gradient_rows = 1;
  std::int64_t gradient_slab = 1;
};

// An algorithm adds what else it has decided. Nothing is decided again when a session is opened.
struct Decision {
  virtual ~Decision() = default;

  const Algorithm* algorithm = nullptr;
  // With every stride filled in.
  Problem problem;
  Sizes sizes;
  // Args::kept, and Args::workspace of a forward or joint pass and of a backward pass.
  Ledger kept, forward, backward;
};

inline std::int64_t peak_bytes(const Decision& d) {
  return d.kept.bytes() + std::max(d.forward.bytes(), d.backward.bytes());
}

inline std::int64_t chunk_count(const Decision& d) {
  return divide_up(row_count(d.problem), d.sizes.chunk_rows);
}

// A chunk's entries of a list of `rows` rows. The last chunks are empty where rows are ignored.
inline RowRange chunk_range(const Sizes& sizes, std::int64_t rows, std::int64_t chunk) {
  const std::int64_t begin = std::min(chunk * sizes.chunk_rows, rows);
  return {begin, std::min(sizes.chunk_rows, rows - begin)};
}

}  // namespace cutloss
