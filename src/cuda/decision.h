// What the CUDA engines' algorithms decide: sizes, and what lies where in the memory of a call.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/ledger.h"
#include "plan/algorithm.h"
#include "plan/buffers.h"

namespace cutloss::cuda {

// The dtype of the products' operands for a problem on a device.
DType product_type(const Problem& problem, const DeviceFacts& device);

namespace buffer {
using namespace cutloss::buffer;
// The arrays of RowTable. The counts are two ints, count and mismatch.
inline constexpr std::string_view kRows = "rows";
inline constexpr std::string_view kCounts = "counts";
inline constexpr std::string_view kPositions = "positions";
inline constexpr std::string_view kTargets = "targets";
inline constexpr std::string_view kInvTemperature = "inverse temperatures";
// DeviceScalars, with fp16 operands.
inline constexpr std::string_view kScalars = "scalars";
// Rows of E, gathered and converted.
inline constexpr std::string_view kE = "E";
// Rows of C, converted.
inline constexpr std::string_view kC = "C";
// A RowGradient for each row of the chunk.
inline constexpr std::string_view kCoefficients = "coefficients";
// cuBLASLt's own memory.
inline constexpr std::string_view kLibrary = "cuBLASLt";
// For the last columns, once dE's sums have left dC: E of a block of rows, and dC's sums of a slab.
inline constexpr std::string_view kLastE = "E of the last columns";
inline constexpr std::string_view kLastDcSums = "dC's sums of the last columns";
// The maxima that are kept beside exponentials, (chunk rows, pieces). The exponentials, or logits,
// are (chunk rows, padded vocabulary).
inline constexpr std::string_view kMaxima = "maxima";
}  // namespace buffer

// How one pass reads its operands.
struct Reads {
  // Rows of E follow each other and are read where they lie.
  bool e_in_place = false;
  // E is packed into dE's memory, which is written last.
  bool e_in_de = false;
  // E is packed for a chunk at a time, and else for a block.
  bool whole_e = true;
  // How many columns of C are converted at a time. Where that is all of them, they are converted
  // once for the call.
  std::int64_t c_columns = 0;
  // The list of rows has no gaps. Without it entry n is row n or nothing, so that rows which are
  // computed where they lie keep their places.
  bool compact = true;
};

struct CudaDecision : Decision {
  // The device that it was made for: its index, and how many multiprocessors it has.
  int device = 0;
  int multiprocessors = 0;
  // Entry i of the list is row i of E and of dE.
  bool identity = false;
  // E may be read where it lies, for rows that follow each other.
  bool evenly = false;
  // In cuda/library: rows and columns of one product of logits in forward, where g takes no memory.
  std::int64_t forward_rows = 0, forward_slab = 0;
  // A single product makes a slab of dC and rounds it itself. The second is for the last columns.
  bool one_product_makes_dc = false;
  bool one_product_makes_last_dc = false;
  // g takes the place of what was kept.
  bool g_in_kept = false;
  // In the last columns kernels find rows of E where they lie, by their positions; or E is packed
  // once more, a block of rows at a time; or, with neither, E is still where it was.
  bool finds_last_e = false;
  bool packs_last_e = false;
  // The reads of a pass with statistics, and those of a backward pass.
  Reads forward_reads, backward_reads;

  const Reads& reads(Pass pass) const {
    return pass == Pass::backward ? backward_reads : forward_reads;
  }
};

// Sets what follows from a problem on a device alone.
void set_facts(CudaDecision& d, const Algorithm& algorithm, const Problem& problem,
               const DeviceFacts& device);
// Sets what follows from the sizes, too: where sums and g lie.
void set_places(CudaDecision& d, Way way);
// Sets how dC's products are made in the last columns. set_places must be called before it, and
// again after it, since it depends on the sizes that are set here.
void set_last(CudaDecision& d, Way way);

// Columns rounded up to a multiple of 16 bytes, and those of the packed E.
std::int64_t padded(std::int64_t columns, DType type);
std::int64_t e_stride(const Problem& problem, DType operand);

// Whether a pass may read E where it lies, and whether it packs E into dE's memory. Backward
// multiplies E by g, so rows that do not count must be zeros there, and what is kept must lie where
// backward expects it; `pass` is both where forward and backward are one call.
bool reads_e_in_place(const CudaDecision& d, Way way, Pass pass);
bool packs_e_in_de(const CudaDecision& d, Way way, Pass pass);

// Throws Error(invalid_value) where the decision was made for another device than the current one.
void need_current_device(const CudaDecision& d);

// Books the list of rows, the same for all algorithms.
void book_rows(Ledger& ledger, const CudaDecision& d);
// Books g of a block, and in its memory what dC of the last columns needs.
void book_g(Ledger& ledger, const CudaDecision& d, const Reads& reads);

inline constexpr std::int64_t kAlign = 256;  // a cache line and more; what cuBLASLt likes best
inline constexpr std::int64_t kMiB = std::int64_t{1} << 20;

}  // namespace cutloss::cuda
