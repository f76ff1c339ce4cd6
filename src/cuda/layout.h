// Where everything lies in the memory of a call: a list of named buffers says both how many bytes
// a plan takes and where its parts find them. An engine with needs of its own adds to the list.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/engine.h"

namespace cutloss::cuda {

struct Need {
  std::string_view name;
  std::int64_t bytes;
};

// Buffers one behind the other, each at a multiple of 256 bytes.
class Layout {
 public:
  Layout() = default;
  explicit Layout(const std::vector<Need>& needs);
  bool has(std::string_view name) const { return find(name) != nullptr; }
  // The buffer's offset; throws Error(internal) where there is none of that name.
  std::int64_t offset(std::string_view name) const;
  std::int64_t bytes_of(std::string_view name) const;  // 0 where there is none
  std::int64_t bytes() const { return bytes_; }

 private:
  struct Placed {
    std::string_view name;
    std::int64_t offset, bytes;
  };
  const Placed* find(std::string_view name) const;
  std::vector<Placed> placed_;
  std::int64_t bytes_ = 0;
};

// The names. Matrices are row-major.
namespace use {
inline constexpr std::string_view kRows = "rows";      // int64: RowTable, an array each
inline constexpr std::string_view kCounts = "counts";  // int[2]: count, mismatch
inline constexpr std::string_view kPositions = "positions";
inline constexpr std::string_view kTargets = "targets";
inline constexpr std::string_view kInvTemperature = "inv_temperature";
inline constexpr std::string_view kScalars = "scalars";  // DeviceScalars, with fp16 operands
inline constexpr std::string_view kStates = "states";    // RowState of the chunk's rows
inline constexpr std::string_view kBias = "bias";        // in the stat dtype
inline constexpr std::string_view kE = "e";              // E gathered and converted
inline constexpr std::string_view kC = "c";              // C converted
inline constexpr std::string_view kZ = "z";              // logits of a block
inline constexpr std::string_view kCoefficients = "coefficients";  // RowGradient of the chunk
inline constexpr std::string_view kG = "g";
inline constexpr std::string_view kDeSums = "de_sums";        // dE of the chunk
inline constexpr std::string_view kDcSums = "dc_sums";        // dC of a slab, or of the vocabulary
inline constexpr std::string_view kDbiasSums = "dbias_sums";  // fp64
// Kept.
inline constexpr std::string_view kKept = "kept";      // (chunk rows, kept_stride)
inline constexpr std::string_view kMaxima = "maxima";  // (chunk rows, pieces): of exponentials
}  // namespace use

// What follows from a problem on the current device.
struct Traits {
  DType operand;            // of the products' operands
  DType stat;               // of statistics and accumulators
  bool keeps_exponentials;  // else z in the stat dtype
  DType kept;
  bool identity;  // entry i of the list is row i of E and of dE
  bool evenly;    // E may be read where it lies, for rows that follow each other
};
// Takes the current device's products into account. Throws Error where there is no device.
Traits traits_of(const Problem& problem);
DType product_type(const Problem& problem);  // Traits::operand

// How much of E and C is converted at a time: less where memory is short.
struct Room {
  bool whole_e;            // E of a chunk, else of a block
  std::int64_t c_columns;  // V: all of C, once for the call
};

// E is read where it lies.
bool reads_e_in_place(const Plan& plan, const Traits& traits, Passes passes);
// The packed E lies in dE's memory, which is written last.
bool packs_e_in_de(const Plan& plan, const Traits& traits, Passes passes);
// g takes the place of what was kept.
bool makes_g_in_place(const Plan& plan, const Traits& traits);
// dE accumulates in its output.
bool accumulates_de_in_place(const Plan& plan, const Traits& traits);
// A single product makes a slab of dC and rounds it itself.
bool one_product_makes_dc(const Plan& plan, const Traits& traits);

std::int64_t e_stride(const Problem& problem, DType operand);  // of the packed E
std::int64_t padded(std::int64_t columns, DType type);         // to 16 bytes
std::int64_t pieces_per_slab(const Plan& plan);
std::int64_t pieces(const Plan& plan);

std::vector<Need> workspace_needs(const Plan& plan, const Traits& traits, Passes passes, Room room);
std::vector<Need> kept_needs(const Plan& plan, const Traits& traits);

// The roomiest choice first; the last is the least. As many for every plan of a problem.
std::vector<Room> rooms(const Plan& plan, const Traits& traits);
// The roomiest layout that fits the pass's bytes in the plan. What is left is cuBLASLt's.
Layout workspace_layout(const Plan& plan, const Traits& traits, Passes passes, Room* room);

std::int64_t workspace_bytes(const Plan& plan, Passes passes);

// The passes for which a pass's memory is laid out: where forward and backward are one call, the
// same for both and for forward alone, so that all make the same bits.
Passes laid_out(const Plan& plan, Passes passes);

}  // namespace cutloss::cuda
