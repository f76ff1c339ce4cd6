// The sizes of cuda/library, and why. Measured on an H200 (docs/kernels.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/text.h"
#include "cuda/tuning.h"

namespace cutloss::cuda::library {

// What a plan is tried with, the quickest first. A later step gives up a little speed for memory;
// there is none that would give up most of it.
struct Step {
  std::int64_t logit_bytes;    // of a block of logits in the stat dtype
  std::int64_t library_bytes;  // cuBLASLt's workspace
  std::int64_t block_rows;     // at most
  std::int64_t least_chunk;    // rows that a chunk must have, unless it has all
  std::int64_t least_slab;     // columns that a slab of gradients must have, unless it has all
  std::int64_t gradient_rows;  // of gradients by vocabulary, at most; 0: all
  double slower;               // the time of a product, in those of the first step
};
// dC's product of a slab of 1024 columns has too few tiles for the device. With blocks of 8 MiB
// beside 2048 columns instead of 16 MiB beside 1024, and forward's larger blocks, (4096, 2048,
// 151936) in 32 MiB takes 6.4 GEMMs on an H200 instead of 6.9 (2026-11-29-h200-narrow.json and
// -memory.json in benchmarks/results).
inline constexpr Step kSteps[] = {
    {128 * kMiB, 32 * kMiB, 8192, 1024, 2048, 0, 1.0},
    {32 * kMiB, 32 * kMiB, 4096, 1024, 2048, 0, 1.0},
    {16 * kMiB, 4 * kMiB, 4096, 512, 2048, 0, 1.1},
    {16 * kMiB, 4 * kMiB, 4096, 512, 2048, 8192, 1.15},
    {8 * kMiB, 4 * kMiB, 2048, 256, 768, 0, 1.25},
    {4 * kMiB, 4 * kMiB, 1024, 256, 512, 0, 1.5},
    {4 * kMiB, 4 * kMiB, 1024, 256, 512, 4096, 1.7},
    {2 * kMiB, 0, 1024, 128, 512, 0, 2.5},
    {kMiB, 0, 512, 128, 256, 0, 4.5},
    {kMiB, 0, 512, 128, 256, 2048, 5.0},
};

// A block of logits passes through L2 where it can. Only quick memory (HBM3), in bytes a second, is
// better used by larger products, which leave fewer multiprocessors idle.
inline constexpr std::int64_t kL2Block = 32 * kMiB;
inline constexpr double kQuickMemory = 3e12;

// Beyond this a slab of gradients gains nothing: dE's sums are read and written once for each.
inline constexpr std::int64_t kMostSlab = 65536;
// The most rows of a chunk, unless one chunk has all: dC's sums are read and written once for each.
inline constexpr std::int64_t kMostChunk = 4096;
inline constexpr std::int64_t kGoodChunk = 2048;
// Columns of g that are made at a time where g has a place of its own, in chunks.
inline constexpr std::int64_t kChunkSlab = 8192;
// Columns of C that are converted at a time where not all of it is.
inline constexpr std::int64_t kSomeColumns = 8192;

inline std::vector<std::string> tuning() {
  std::vector<std::string> lines;
  for (const Step& s : kSteps) {
    lines.push_back(text("logits of ", s.logit_bytes / kMiB, " MiB, cuBLASLt's ",
                         s.library_bytes / kMiB, " MiB, blocks of ", s.block_rows,
                         " rows, chunks from ", s.least_chunk, ", slabs from ", s.least_slab,
                         ", gradients of ", s.gradient_rows, " rows: a product takes ", s.slower));
  }
  lines.push_back(
      text("logits beyond ", kL2Block / kMiB, " MiB from ", kQuickMemory, " bytes/s on"));
  lines.push_back(
      text("slabs of gradients to ", kMostSlab, " columns, ", kChunkSlab, " in chunks"));
  lines.push_back(text("chunks to ", kMostChunk, " rows, good from ", kGoodChunk));
  lines.push_back(text("columns of C converted at a time: ", kSomeColumns));
  lines.push_back(text("operations for a byte of sums: ", kFlopsPerByte));
  return lines;
}

}  // namespace cutloss::cuda::library
