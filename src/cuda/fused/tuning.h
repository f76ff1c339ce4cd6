// The sizes of the fused engine, with the reasons. They were measured on an H200 (docs/kernels.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/text.h"
#include "cuda/tuning.h"

namespace cutloss::cuda::fused {

// How many rows a block has.
inline constexpr std::int64_t kBlockRows = 256;

// Beyond this a slab of gradients gains nothing: slabs of 44,000 to 51,000 columns (1 GiB in
// benchmarks/results/2026-11-29-h200-wide-slabs.json) took up to 3 % more than those of 22,000 to
// 26,000 (512 MiB).
inline constexpr std::int64_t kMostSlab = 26112;
inline constexpr std::int64_t kSlabUnit = 64;
// With fewer columns most of the device would wait.
inline constexpr std::int64_t kLeastSlab = 768;
// By rows chunks of more rows gain little. dC's sums are read and written once for each chunk.
inline constexpr std::int64_t kGoodChunk = 2048;
inline constexpr std::int64_t kMostChunk = 4096;
// With fewer rows dC's sums take longer than a fourth product.
inline constexpr std::int64_t kLeastChunk = 1024;
// How many columns of C are converted at a time in forward, where not all of them are.
inline constexpr std::int64_t kForwardSlab = 24576;
inline constexpr std::int64_t kSmallForwardSlab = 1536;
// How many columns of C are converted at a time, as memory allows.
inline constexpr std::int64_t kSomeColumns[] = {32768, 8192};
// cuBLASLt's workspace, as memory allows, and the time that less of it costs dE's product, in
// products.
struct LibraryMemory {
  std::int64_t bytes;
  double slower;
};
inline constexpr LibraryMemory kLibraryMemory[] = {{32 * kMiB, 0}, {4 * kMiB, 0.01}, {0, 0.02}};
// By vocabulary: how many operations take as long as reading or writing a byte of dE's sums, which
// the library does when it has multiplied and our own product while it multiplies; and as a
// kernel's launch, its first loads and its last stores. What our own product costs more beside wide
// slabs, in products. Fitted to slabs of 768 to 50,000 columns on an H200.
inline constexpr double kLibraryFlopsPerByte = 163;
inline constexpr double kOwnFlopsPerByte = 60;
inline constexpr double kFlopsOfLaunch = 8e9;
inline constexpr double kOwnSlower = 0.05;
// tanh is good to an absolute 2^-22, so a logit to 2^-22 of the softcap.
inline constexpr double kMostSoftcap = 256;

inline std::vector<std::string> tuning() {
  std::vector<std::string> lines = {
      text("blocks of ", kBlockRows, " rows"),
      text("slabs of gradients of ", kLeastSlab, " to ", kMostSlab, " columns"),
      text("chunks of ", kLeastChunk, " to ", kMostChunk, " rows, good from ", kGoodChunk),
      text("columns of C converted at a time: in forward ", kForwardSlab, " or ", kSmallForwardSlab,
           ", else ", kSomeColumns[0], " or ", kSomeColumns[1]),
      text("softcap to ", kMostSoftcap),
      text("operations for a byte of sums: ", kFlopsPerByte, ", by vocabulary ",
           kLibraryFlopsPerByte, " in the library and ", kOwnFlopsPerByte,
           " in our own product, which costs ", kOwnSlower, " products more beside wide slabs"),
      text("operations that a launch takes as long as: ", kFlopsOfLaunch)};
  for (const LibraryMemory& library : kLibraryMemory) {
    lines.push_back(
        text("cuBLASLt's ", library.bytes / kMiB, " MiB: ", library.slower, " products slower"));
  }
  return lines;
}

}  // namespace cutloss::cuda::fused
