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
  // Of the whole vocabulary, (total), stat dtype; zbar = sum_v weight_v z_v / total.
  const void* class_weight = nullptr;
};

// Per-row results, (rows) each. Stat dtype: f64 where compute_type is f64, else f32. Rows that
// are ignored get 0 everywhere (argmax: -1).
struct RowOutputs {
  void* nll = nullptr;
  void* lse = nullptr;      // optional
  void* row_max = nullptr;  // lse = row_max + log_sum, in two parts so that no digit is lost
  void* log_sum = nullptr;
  void* entropy = nullptr;         // wanted.entropy
  void* zbar = nullptr;            // wanted.zbar: this, zbar_centred, or both
  std::int64_t* argmax = nullptr;  // wanted.argmax; the first of equal logits
  void* zbar_centred = nullptr;    // sum_v weight_v (z_v - row_max) / V: no digit goes to an offset
  // wanted.state, and then nothing else is written by forward: a record of row_state_bytes (rows.h)
  // for each row, which only this build of the library reads. Aligned to 8 bytes.
  void* state = nullptr;
};

// dLoss/d(output), (rows) each, stat dtype; null is zero. Entries of ignored rows are not read.
struct RowGradients {
  const void* d_nll = nullptr;
  const void* d_lse = nullptr;
  const void* d_lse_squared = nullptr;  // of lse^2 (z-loss)
  const void* d_entropy = nullptr;
  const void* d_zbar = nullptr;
};

// Packed, in the dtypes that GradientWanted says. Written whole, rows that are ignored included
// (zeros), or added to. Null where not wanted. While a call or a session makes them, the memory of
// those that are written may hold other things: logits or sums in dC, packed rows of E in dE.
struct Gradients {
  void* de = nullptr;     // (sequences, length, D)
  void* dc = nullptr;     // (V, D)
  void* dbias = nullptr;  // (V)
};

// Pointers of one call. 64-byte alignment of kept and workspace is required (and E and C run
// fastest so); nothing may alias an output. kept carries logits from forward to backward where
// plan.keeps_logits, else it is scratch like workspace.
struct Args {
  Inputs in;
  RowOutputs rows;
  RowGradients upstream;
  Gradients gradients;
  void* kept = nullptr;
  void* workspace = nullptr;
  void* stream = nullptr;  // CUDA: the cudaStream_t all work is ordered on
  // CUDA, with dE wanted; optional: a cudaEvent_t that is recorded on `stream` once dE is written,
  // which can be before the last products of dC. A stream that waits for it, and no longer, may
  // read and write dE (to sum it over ranks, say) beside them.
  void* de_event = nullptr;
};

// Statistics of every row. Reads in; writes rows (and kept, where plan.keeps_logits).
// Deterministic: the same bits for the same inputs, plan and number of threads.
void forward(const Plan& plan, const Args& args);

// Gradients from the statistics that forward wrote. Reads in, rows (nll, row_max, log_sum and,
// where d_entropy is given, entropy), upstream and, where plan.keeps_logits, kept. Writes
// gradients and nothing else but workspace: it may be called again.
void backward(const Plan& plan, const Args& args);

// Forward and backward in one call, for a plan with upstream at_forward and schedule rows.
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
// nothing that a device reads after a call of its own has returned. All throw Error(invalid_value)
// for a chunk that there is not, and before anything is written.
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
  // The statistics of the chunk were the last to be made, here or in a session before this one.
  virtual void gradients(std::int64_t chunk) = 0;
  // What is left of the gradients: rows that do not count, and everything where none does.
  virtual void finish() = 0;
};

std::int64_t chunk_count(const Plan& plan);

// Throws Error(invalid_value) for pointers that are missing or misaligned, for a pass that the plan
// has not, and for a plan of another device.
std::unique_ptr<Session> open(const Plan& plan, const Args& args, Pass pass);

// For callers who cannot keep a session: one that continues where another left off, in the same
// memory. begin was called there, and must not be here.
std::unique_ptr<Session> resume(const Plan& plan, const Args& args, Pass pass);

}  // namespace cutloss
