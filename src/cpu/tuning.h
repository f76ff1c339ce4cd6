// The sizes of the CPU engine's blocks, with the reasons.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/text.h"

namespace cutloss::cpu {

// Rows and columns of one product, the quickest first. Later ones are for short memory.
struct Tile {
  std::int64_t rows, columns;
};
inline constexpr std::array<Tile, 6> kTiles = {
    {{2048, 1024}, {1024, 1024}, {512, 512}, {256, 256}, {128, 128}, {64, 64}}};

// The columns of the first tile beside so many rows. A block of logits in fp32 stays within 4 MB,
// and within 2 MB where rows are few, so that it is in L2 when the row work reads it; with very few
// rows a slab takes more columns, so that a product stays worth its call.
inline std::int64_t columns_beside(std::int64_t rows) {
  constexpr std::int64_t kMostColumns = 8192;
  const std::int64_t in_4mb = std::max<std::int64_t>((std::int64_t{1} << 20) / rows, 512);
  const std::int64_t in_2mb = std::max<std::int64_t>((std::int64_t{1} << 19) / rows, 1024);
  return std::min({in_4mb, in_2mb, kMostColumns});
}

// How many rows' logits are kept at a time. Each chunk reads and writes dC's sums once.
inline constexpr std::int64_t kMostChunk = 2048;
inline constexpr std::int64_t kLeastChunk = 128;

// How many operations of a product take as long as reading or writing one byte of sums: plans
// foretell their time by it. Not measured; it only orders plans.
inline constexpr double kFlopsPerByte = 8;

// Blocks, chunks and slabs are multiples of this, a row of tiles of the matrix library.
inline constexpr std::int64_t kUnit = 16;

// How many columns a thread takes at a time where it sums columns, and how many rows it adds up in
// the stat dtype.
inline constexpr std::int64_t kStrip = 512;
inline constexpr std::int64_t kFewRows = 32;

inline std::vector<std::string> tuning() {
  std::vector<std::string> lines;
  for (const Tile& tile : kTiles) {
    lines.push_back(text("tile of ", tile.rows, " rows x ", tile.columns, " columns"));
  }
  lines.push_back(
      text("chunks of ", kLeastChunk, " to ", kMostChunk, " rows, in units of ", kUnit));
  lines.push_back(text("columns of 2048 rows beside the first tile: ", columns_beside(2048)));
  lines.push_back(text("operations for a byte of sums: ", kFlopsPerByte));
  return lines;
}

}  // namespace cutloss::cpu
