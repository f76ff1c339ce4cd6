// What the CUDA engines' algorithms decide: sizes, and what lies where in the memory of a call.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/ledger.h"
#include "plan/algorithm.h"
#include "plan/buffers.h"

namespace cutloss::cuda {

// The dtype of the products' operands on a device for a problem.
DType product_type(const Problem& problem, const DeviceFacts& device);

namespace buffer {
using namespace cutloss::buffer;
// RowTable, an array each; int64, int[2]: count and mismatch, int, int, stat dtype.
inline constexpr std::string_view kRows = "rows";
inline constexpr std::string_view kCounts = "counts";
inline constexpr std::string_view kPositions = "positions";
inline constexpr std::string_view kTargets = "targets";
inline constexpr std::string_view kInvTemperature = "inverse temperatures";
// DeviceScalars, with fp16 operands.
inline constexpr std::string_view kScalars = "scalars";
// E gathered and converted.
inline constexpr std::string_view kE = "E";
// C converted.
inline constexpr std::string_view kC = "C";
// RowGradient of the chunk.
inline constexpr std::string_view kCoefficients = "coefficients";
// cuBLASLt's own memory.
inline constexpr std::string_view kLibrary = "cuBLASLt";
// Of dC's last rows, once dE's sums have left: E of a block of rows, dC's sums of a slab.
inline constexpr std::string_view kLastE = "E of the last columns";
inline constexpr std::string_view kLastDcSums = "dC's sums of the last columns";
// What is kept is (chunk rows, padded vocabulary); beside exponentials their maxima, (chunk rows,
// pieces).
inline constexpr std::string_view kMaxima = "maxima";
}  // namespace buffer

// How one pass reads its operands.
struct Reads {
  // Rows of E follow each other and are read where they lie.
  bool e_in_place = false;
  // E is packed into dE's memory, which is written last.
  bool e_in_de = false;
  // E is packed for a chunk at a time, else for a block.
  bool whole_e = true;
  // Columns of C that are converted at a time; all of them: once for the call.
  std::int64_t c_columns = 0;
  // The list of rows has no gaps. Else entry n is row n or nothing: rows that are computed where
  // they lie keep their places.
  bool compact = true;
};

struct CudaDecision : Decision {
  // What it was made for: the index of the device, and how many multiprocessors it has.
  int device = 0;
  int multiprocessors = 0;
  // Entry i of the list is row i of E and of dE.
  bool identity = false;
  // E may be read where it lies, for rows that follow each other.
  bool evenly = false;
  // cuda/library: rows and columns of one product of logits in forward, where no g takes memory.
  std::int64_t forward_rows = 0, forward_slab = 0;
  // A single product makes a slab of dC and rounds it itself; and in the last columns.
  bool one_product_makes_dc = false;
  bool one_product_makes_last_dc = false;
  // g takes the place of what was kept.
  bool g_in_kept = false;
  // In the last columns kernels find rows of E by their positions, where these lie. Else E is
  // packed once more, a block of rows at a time, unless it is where it was.
  bool finds_last_e = false;
  bool packs_last_e = false;
  // Of forward or joint sessions, and of backward.
  Reads forward_reads, backward_reads;

  const Reads& reads(Pass pass) const {
    return pass == Pass::backward ? backward_reads : forward_reads;
  }
};

// What follows from a problem on a device alone.
void set_facts(CudaDecision& d, const Algorithm& algorithm, const Problem& problem,
               const DeviceFacts& device);
// What follows from the sizes too: where sums and g lie.
void set_places(CudaDecision& d, Way way);
// How dC's products are made in the last columns. Call set_places before it, and again after it,
// since it depends on these sizes.
void set_last(CudaDecision& d, Way way);

std::int64_t e_stride(const Problem& problem, DType operand);  // of the packed E
std::int64_t padded(std::int64_t columns, DType type);         // to 16 bytes

// Whether a pass may read E where it lies, and whether it packs E into dE's memory. Backward
// multiplies E by g, so rows that do not count must be zeros there, and what is kept must lie where
// backward expects it; `pass` is both where forward and backward are one call.
bool reads_e_in_place(const CudaDecision& d, Way way, Pass pass);
bool packs_e_in_de(const CudaDecision& d, Way way, Pass pass);

// Throws Error(invalid_value) where it was made for another device than the current one.
void need_current_device(const CudaDecision& d);

// Books the list of rows, the same for all algorithms.
void book_rows(Ledger& ledger, const CudaDecision& d);
// Books g of a block, and in its memory what dC of the last columns needs.
void book_g(Ledger& ledger, const CudaDecision& d, const Reads& reads);

inline constexpr std::int64_t kAlign = 256;  // a cache line and more; what cuBLASLt likes best
inline constexpr std::int64_t kMiB = std::int64_t{1} << 20;

}  // namespace cutloss::cuda
