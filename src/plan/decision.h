// What an algorithm has decided for a problem, which is all that its sessions need beside the
// pointers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/ledger.h"
#include "core/ranges.h"
#include "core/sizes.h"
#include "cutloss/problem.h"

namespace cutloss {

struct Algorithm;

// How many rows and columns are taken at a time.
struct Sizes {
  // Rows whose statistics are made together: all rows, or a chunk whose logits are kept.
  std::int64_t chunk_rows = 1;
  // Rows and columns of one product of logits.
  std::int64_t block_rows = 1;
  std::int64_t slab = 1;
  // Rows and columns of one of the gradients' products.
  std::int64_t gradient_rows = 1;
  std::int64_t gradient_slab = 1;
};

// By vocabulary dE's sums may wait in the last rows of dC, which are written last. The gradients of
// the columns from `begin` on are then made twice: once for dE, and again for dC when the sums have
// left. Where the sums lie elsewhere `begin` is V.
struct LastColumns {
  std::int64_t begin = 0;
  // Rows and columns of dC's products in these columns.
  std::int64_t gradient_rows = 0;
  std::int64_t gradient_slab = 0;
};

// Engines add what else they decide. Nothing is decided again when a session is opened.
struct Decision {
  virtual ~Decision() = default;

  const Algorithm* algorithm = nullptr;
  // The problem, with every stride filled in.
  Problem problem;
  // The dtype of the products' operands, and that of statistics and accumulators.
  DType operand = DType::f32;
  DType stat = DType::f32;
  // The dtypes of the gradients.
  DType de_type = DType::f32, dc_type = DType::f32, dbias_type = DType::f32;
  // C and the bias are converted, or read where they lie.
  bool converts_c = false, converts_bias = false;
  // Sums that have no place of their own accumulate in their output.
  bool de_in_place = false, dc_in_place = false;
  // One chunk holds every row.
  bool one_chunk = false;
  // What is kept of logits: exponentials times the softcap's slope in the products' dtype, or z in
  // the stat dtype where g needs z itself.
  bool keeps_exponentials = false;
  DType kept_type = DType::f32;
  Sizes sizes;
  LastColumns last;
  // The memory at Args::kept, and at Args::workspace in a pass with statistics and in a backward
  // pass.
  Ledger kept, forward, backward;
  // The time of forward and backward together, in products of N x V x D.
  double predicted_time = 0;

  bool has_de_sums_in_dc() const { return last.begin < classes_of(problem).count; }
};

// Sets what follows from the problem and the products' dtype alone.
void set_problem(Decision& d, const Algorithm& algorithm, const Problem& problem, DType operand);

// Finds the first column, a multiple of `unit`, from which on dE's sums may wait in the rows of dC;
// V where they may not. `in_place` says that dE's sums have a place already.
std::int64_t begin_of_last_columns(const Decision& d, bool in_place, std::int64_t unit);
inline constexpr std::int64_t kSumsAlign = 256;
// Where dE's sums begin in dC: at the row of the first last column, or at the next multiple of
// kSumsAlign bytes.
void* sums_in_dc(const Decision& d, void* dc);

// Books the sums of the gradients that are wanted: dE's unless they lie in dC or in dE itself, dC's
// where `has_dc_sums`, and dbias's.
void book_sums(Ledger& ledger, const Decision& d, bool has_de_sums, bool has_dc_sums);

inline std::int64_t peak_bytes(const Decision& d) {
  return d.kept.bytes() + std::max(d.forward.bytes(), d.backward.bytes());
}

inline std::int64_t chunk_count(const Decision& d) {
  return divide_up(row_count(d.problem), d.sizes.chunk_rows);
}

// The entries of a chunk in a list of `rows` rows. The last chunks are empty where rows are
// ignored.
inline RowRange chunk_range(const Sizes& sizes, std::int64_t rows, std::int64_t chunk) {
  const std::int64_t begin = std::min(chunk * sizes.chunk_rows, rows);
  return {begin, std::min(sizes.chunk_rows, rows - begin)};
}

}  // namespace cutloss
