// The calls of a plan, and the pointers that they take.
#pragma once

#include <cstdint>
#include <memory>

#include "cutloss/plan.h"

namespace cutloss {

struct Inputs {
  const void* e = nullptr;
  const void* c = nullptr;
  const void* bias = nullptr;         // (V)
  const void* targets = nullptr;      // (sequences, length)
  const void* temperature = nullptr;  // (rows), stat dtype, each > 0
  // The weights of all classes of the vocabulary, (total), stat dtype:
  // zbar = sum_v weight_v z_v / total.
  const void* class_weight = nullptr;
};

// Per-row results, (rows) each, in the stat dtype: f64 where compute_type is f64, else f32. Rows
// that are ignored get 0 everywhere (argmax: -1).
struct RowOutputs {
  void* nll = nullptr;
  void* lse = nullptr;      // optional
  void* row_max = nullptr;  // lse = row_max + log_sum, in two parts so that no digit is lost
  void* log_sum = nullptr;
  void* entropy = nullptr;         // needed with wanted.entropy
  void* zbar = nullptr;            // wanted.zbar needs this, zbar_centred, or both
  std::int64_t* argmax = nullptr;  // needed with wanted.argmax; the first of equal logits counts
  void* zbar_centred = nullptr;    // sum_v weight_v (z_v - row_max) / V: an offset costs no digit
  // Needed with wanted.state, where forward writes nothing else: a record of row_state_bytes
  // (rows.h) for each row, which only this build of the library reads. It is aligned to 8 bytes.
  void* state = nullptr;
};

// dLoss/d(output), (rows) each, in the stat dtype. Null stands for zero. Entries of ignored rows
// are not read.
struct RowGradients {
  const void* d_nll = nullptr;
  const void* d_lse = nullptr;
  const void* d_lse_squared = nullptr;  // the gradient of lse^2 (z-loss)
  const void* d_entropy = nullptr;
  const void* d_zbar = nullptr;
};

// The gradients, packed, in the dtypes that GradientWanted says; null where they are not wanted.
// They are written whole, with zeros in rows that are ignored, or added to. While a call or a
// session makes them, the memory of those that are written may hold other things: logits or sums in
// dC, packed rows of E in dE.
struct Gradients {
  void* de = nullptr;     // (sequences, length, D)
  void* dc = nullptr;     // (V, D)
  void* dbias = nullptr;  // (V)
};

// The pointers of one call. kept and workspace must be aligned to 64 bytes (E and C are read
// fastest so, too), and nothing may alias an output. Where plan.keeps_logits is set, kept carries
// logits from forward to backward; else it is scratch like workspace.
struct Args {
  Inputs in;
  RowOutputs rows;
  RowGradients upstream;
  Gradients gradients;
  void* kept = nullptr;
  void* workspace = nullptr;
  void* stream = nullptr;  // CUDA: the cudaStream_t all work is ordered on
};

// Makes the statistics of every row: reads in, writes rows (and kept, where plan.keeps_logits).
// The same inputs, plan and number of threads make the same bits.
void forward(const Plan& plan, const Args& args);

// Makes the gradients from the statistics that forward wrote: reads in, rows (nll, row_max, log_sum
// and, where d_entropy is given, entropy), upstream and, where plan.keeps_logits, kept. It writes
// gradients and nothing else but workspace, so it may be called again.
void backward(const Plan& plan, const Args& args);

// Does forward's and backward's work in one call, for a plan with upstream at_forward and schedule
// rows.
void forward_backward(const Plan& plan, const Args& args);

// The rows of a chunk, as indices into the per-row arrays. CUDA: `rows` is device memory, and an
// entry of -1 stands for no row: how many rows count the host need not know.
struct RowList {
  const std::int64_t* rows = nullptr;
  std::int64_t count = 0;
};

// A call taken apart, for losses whose upstream coefficients are functions of the rows' own
// statistics: between statistics and gradients of a chunk the caller writes args.upstream for that
// chunk's rows. Call begin once, then statistics and gradients for chunk = 0 .. chunk_count - 1 in
// order (those of the session's pass), then finish where there are gradients. A chunk may be empty.
//
// A session holds the plan's decision and a copy of the pointers, owns no device memory, and holds
// nothing that a device reads after a call of its own has returned. All members throw
// Error(invalid_value) for a chunk that does not exist, and before anything is written.
class Session {
 public:
  Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  virtual ~Session() = default;

  // Checks targets and temperatures, where that needs no waiting, and lists the rows that count.
  virtual void begin() = 0;
  virtual RowList rows(std::int64_t chunk) = 0;
  virtual void statistics(std::int64_t chunk) = 0;
  // The statistics of this chunk must be the last that were made, here or in an earlier session.
  virtual void gradients(std::int64_t chunk) = 0;
  // Writes what is left of the gradients: rows that do not count, and everything where none does.
  virtual void finish() = 0;
};

std::int64_t chunk_count(const Plan& plan);

// Throws Error(invalid_value) for pointers that are missing or misaligned, for a pass that the plan
// has not, and for a plan of another device.
std::unique_ptr<Session> open(const Plan& plan, const Args& args, Pass pass);

// Opens a session that continues where another left off, in the same memory, for callers who cannot
// keep one. begin was called there, and must not be called here.
std::unique_ptr<Session> resume(const Plan& plan, const Args& args, Pass pass);

}  // namespace cutloss
