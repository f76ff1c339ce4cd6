// cutloss: the loss of a large-vocabulary model, and its gradients, without the logits.
//
//   logits a[n,v] = logit_scale * dot(E[n], C[v]) + bias[v]
//          s      = softcap * tanh(a / softcap)            (s = a without a softcap)
//          z      = s / temperature[n]
//   nll[n] = lse[n] - z[n, target[n]],  lse[n] = log(sum_v exp(z[n,v]))
//
// The way of a call:  Problem (plain facts) -> make_plan -> the caller allocates -> forward,
// backward or forward_backward. Nothing here allocates memory in proportion to N, V or D (the
// matrix libraries have scratch memory of their own), knows a framework or holds a global lock.
// Every function reports failure by throwing cutloss::Error, before it has written anything, except
// where an allocation inside a library fails.
//
// Letters: N rows, V vocabulary, D hidden size (Wijmans et al. 2025, "Cut Your Losses in
// Large-Vocabulary Language Models"). docs/math.md derives every formula.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cutloss/version.h"

namespace cutloss {

enum class DType : std::uint8_t { f32, f64, bf16, f16 };
enum class IndexType : std::uint8_t { i32, i64 };
enum class Device : std::uint8_t { cpu, cuda };

// When the upstream gradients of a row's outputs are known.
enum class Upstream : std::uint8_t {
  none,         // no gradient is wanted
  at_forward,   // given to forward_backward, up to one scalar factor (mean and sum reductions)
  at_backward,  // given to backward only (per-token losses, a differentiable lse or entropy)
};

// How the gradients are made; docs/math.md, "Two schedules".
enum class Schedule : std::uint8_t {
  automatic,   // the plan takes the cheapest that fits the workspace
  none,        // forward alone (chosen where no gradient is wanted)
  rows,        // logits of a chunk of rows are kept: three products
  vocabulary,  // logits are recomputed slab by slab: four products, least memory
};

enum class ErrorCode : std::uint8_t {
  invalid_value,  // a size, an option, a target
  invalid_type,   // a dtype, or a mix of dtypes
  unsupported,    // valid, but no engine does it; the message says what to do instead
  workspace,      // max_workspace is too small for every plan
  out_of_memory,  // a library could not allocate
  internal,       // a defect of cutloss
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

// Plain facts about one loss. Sizes and strides in elements.
struct Problem {
  // E is (sequences, length, D); targets are (sequences, length), contiguous. With shift = k the
  // row at position p of a sequence predicts the target at position p + k, and the last k
  // positions of each sequence predict nothing. The rows of the loss are therefore
  // (sequences, length - shift), in that order; every per-row array has that many entries.
  std::int64_t sequences = 1;
  std::int64_t length = 0;
  std::int64_t V = 0;
  std::int64_t D = 0;
  std::int64_t shift = 0;

  // The last dimension of E and C is contiguous. 0 means packed.
  std::int64_t e_sequence_stride = 0;
  std::int64_t e_row_stride = 0;
  std::int64_t c_row_stride = 0;

  DType e_type = DType::f32;     // E and dE
  DType c_type = DType::f32;     // C and dC
  DType bias_type = DType::f32;  // bias and dbias
  // The dtype of the products' operands. f32 and bf16 accumulate in fp32, f64 in fp64; f64 takes
  // f64 operands only. f16 rounds operands no further than they are stored.
  DType compute_type = DType::f32;
  bool allow_tf32 = false;  // CUDA: fp32 products may round their operands to tf32
  IndexType target_type = IndexType::i64;

  bool has_bias = false;
  std::int64_t ignore_index = -100;  // rows with this target are left out
  // CUDA: how many rows are not ignored, where the host knows: what the matrix library computes
  // then shrinks to those rows. A number that does not agree with the targets makes every output
  // NaN. The CPU counts for itself.
  std::optional<std::int64_t> num_valid;
  std::optional<double> softcap;     // > 0
  double logit_scale = 1.0;          // finite, not 0
  double temperature = 1.0;          // > 0; divides into a per-row temperature where one is given
  bool has_row_temperature = false;  // Inputs::temperature is given
  bool has_class_weight = false;     // Inputs::class_weight is given (it only enters zbar)

  // Outputs beyond nll, row_max and log_sum, which always come.
  bool wants_entropy = false;
  bool wants_zbar = false;
  bool wants_argmax = false;

  bool needs_de = false;
  bool needs_dc = false;
  bool needs_dbias = false;
  Upstream upstream = Upstream::none;
  bool entropy_gradient = false;  // RowGradients::d_entropy may be given
  bool zbar_gradient = false;     // RowGradients::d_zbar may be given

  Device device = Device::cpu;
  // Bytes of memory, kept and workspace together, that a plan may ask for. Unset: 512 MiB, or
  // what the smallest plan needs where that is more; on CUDA at least 4 N D bytes and 128 MiB, and
  // a copy of C in the products' dtype beside that where C has another one.
  std::optional<std::int64_t> max_workspace;
  Schedule schedule = Schedule::automatic;
  std::string engine;  // empty: the first that supports the problem

  bool operator==(const Problem&) const = default;
};

inline constexpr std::int64_t kDefaultWorkspace = std::int64_t{512} << 20;

// sequences * (length - shift): the length of every per-row array.
std::int64_t row_count(const Problem& problem);

// What was decided for a problem, and why. Made by make_plan, read by anybody.
struct Plan {
  Problem problem;  // with every stride filled in
  std::string engine;
  Schedule schedule = Schedule::none;
  // rows, upstream known at backward: forward keeps the logits, backward makes the gradients.
  bool keeps_logits = false;
  int products = 1;  // N*V*D products of forward and backward together

  std::int64_t chunk_rows = 0;  // rows whose logits are kept at a time (schedule rows)
  std::int64_t block_rows = 0;  // rows and vocabulary columns of one product of forward
  std::int64_t slab = 0;
  std::int64_t gradient_rows = 0;  // the same for the products of the gradients
  std::int64_t gradient_slab = 0;

  std::int64_t kept_bytes = 0;                // Args::kept
  std::int64_t forward_workspace_bytes = 0;   // Args::workspace of forward, forward_backward
  std::int64_t backward_workspace_bytes = 0;  // Args::workspace of backward

  std::vector<std::string> reasons;  // a line for each engine and schedule considered
};

struct Inputs {
  const void* e = nullptr;
  const void* c = nullptr;
  const void* bias = nullptr;          // (V)
  const void* targets = nullptr;       // (sequences, length)
  const void* temperature = nullptr;   // (rows), stat dtype, each > 0
  const void* class_weight = nullptr;  // (V), stat dtype; zbar = sum_v weight_v z_v / V
};

// Per-row results, (rows) each. Stat dtype: f64 where compute_type is f64, else f32. Rows that
// are ignored get 0 everywhere (argmax: -1).
struct RowOutputs {
  void* nll = nullptr;
  void* lse = nullptr;      // optional
  void* row_max = nullptr;  // lse = row_max + log_sum, in two parts so that no digit is lost
  void* log_sum = nullptr;
  void* entropy = nullptr;         // wants_entropy
  void* zbar = nullptr;            // wants_zbar: this, zbar_centred, or both
  std::int64_t* argmax = nullptr;  // wants_argmax; the first of equal logits
  void* zbar_centred = nullptr;    // sum_v weight_v (z_v - row_max) / V: no digit goes to an offset
};

// dLoss/d(output), (rows) each, stat dtype; null is zero. Entries of ignored rows are not read.
struct RowGradients {
  const void* d_nll = nullptr;
  const void* d_lse = nullptr;
  const void* d_lse_squared = nullptr;  // of lse^2 (z-loss)
  const void* d_entropy = nullptr;
  const void* d_zbar = nullptr;
};

// Packed, in the dtype of what they are the gradient of. Written whole, rows that are ignored
// included (zeros). Null where needs_* is false. Between statistics and gradients of a chunk dC's
// memory may hold logits.
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
};

// Validates the problem and decides engine, schedule and sizes. Touches no data.
// Throws Error(invalid_value, invalid_type, unsupported, workspace).
Plan make_plan(const Problem& problem);

// The plan in words: engine, schedule, sizes, bytes, and the reasons, one a line.
std::string describe(const Plan& plan);

// Statistics of every row. Reads in; writes rows (and kept, where plan.keeps_logits).
// Deterministic: the same bits for the same inputs, plan and number of threads.
void forward(const Plan& plan, const Args& args);

// Gradients from the statistics that forward wrote. Reads in, rows (nll, row_max, log_sum and,
// where d_entropy is given, entropy), upstream and, where plan.keeps_logits, kept. Writes
// gradients and nothing else but workspace: it may be called again.
void backward(const Plan& plan, const Args& args);

// Forward and backward in one call, for a plan with upstream at_forward and schedule rows.
void forward_backward(const Plan& plan, const Args& args);

// forward_backward taken apart, for losses whose upstream coefficients are functions of the
// rows' own statistics: between statistics and gradients of a chunk the caller writes
// args.upstream for that chunk's rows. Call begin once, then statistics and gradients for
// chunk = 0 .. chunk_count - 1 in order, then finish. A chunk may be empty.
std::int64_t chunk_count(const Plan& plan);
void begin(const Plan& plan, const Args& args);
void statistics(const Plan& plan, const Args& args, std::int64_t chunk);
void gradients(const Plan& plan, const Args& args, std::int64_t chunk);
void finish(const Plan& plan, const Args& args);
// The rows of a chunk after begin, as indices into the per-row arrays. CUDA: `rows` is device
// memory, and beyond the rows that count (which the host need not know) it holds -1.
struct RowList {
  const std::int64_t* rows;
  std::int64_t count;
};
RowList chunk_rows(const Plan& plan, const Args& args, std::int64_t chunk);

// How rows count in a loss, in the words of PyTorch's F.cross_entropy. With t the token weight of a
// row, w that of its target's class (1 where not given), eps = label_smoothing and W = sum_v w_v:
//   t ((1 - eps) w nll + eps (W lse / V - zbar) + z_loss lse^2)
// Weights in the stat dtype.
struct Weighting {
  // Divided by the sum of t w, what z_loss adds by the sum of t.
  bool mean = false;
  double label_smoothing = 0;          // in [0, 1]
  double z_loss = 0;                   // >= 0
  const void* token_weight = nullptr;  // (sequences, length): a row's lies where its target does
  const void* class_weight = nullptr;  // (V)
};

// The coefficients of a loss, (rows) each, stat dtype: RowGradients, to be written. Ignored rows
// get 0.
struct LossTerms {
  void* nll = nullptr;
  void* lse = nullptr;          // with label_smoothing, and only then
  void* lse_squared = nullptr;  // with z_loss
  void* zbar = nullptr;         // with label_smoothing
  bool* undefined = nullptr;    // one: the mean of nothing. Its coefficients are 0.
};

// What `weighting` makes of the targets, (sequences, length) in the memory of the problem's device,
// as all else. Sums are in fp64 in a fixed order. A target outside of the vocabulary has the weight
// of the nearest class: forward names it. CUDA: one kernel on the stream, nothing waits. Throws
// Error(invalid_value, unsupported).
void loss_terms(const Problem& problem, const Weighting& weighting, const void* targets,
                const LossTerms& terms, void* stream);

// The loss whose coefficients are args.upstream: the sum over rows of d_nll nll + d_lse lse +
// d_lse_squared lse^2 + d_zbar zbar, added up in fp64 in a fixed order, to one number of the stat
// dtype at `loss` (in the memory of the problem's device). Ignored rows are not read. Where
// `undefined` is given (there too) and true, the loss is NaN.
//
// rows.zbar_centred says that d_lse and d_zbar are those of label smoothing (loss_terms), whose
// d_lse lse + d_zbar zbar is taken as d_lse log_sum + d_zbar zbar_centred: the same number, without
// the difference of two large ones where all logits of a row lie far from 0.
void weighted_loss(const Plan& plan, const Args& args, void* loss, const bool* undefined = nullptr);

// CUDA: values *= *factor, both in device memory, ordered on the stream. Nothing is read or written
// where the factor is 1, and the host need not know. Throws Error(unsupported) in a build without
// CUDA.
void cuda_scale(DType type, void* values, std::int64_t count, DType factor_type, const void* factor,
                void* stream);

// What was found on this machine: a line for each engine (and why it is not there), the
// libraries behind it with their versions, processor features.
std::vector<std::string> describe_machine();

std::string_view name(DType type);
std::string_view name(Schedule schedule);

}  // namespace cutloss
