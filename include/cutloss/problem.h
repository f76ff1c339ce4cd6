// Plain facts about one loss: its rows, where its logits come from, what becomes of them, and what
// is wanted. Sizes and strides are in elements. A Problem holds no pointer and is cheap to copy.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "cutloss/types.h"

namespace cutloss {

// E or the logits have (sequences, length) positions, and so have the targets, which are
// contiguous. With shift = k the row at position p of a sequence predicts the target at position
// p + k, and the last k positions of each sequence predict nothing. The rows of the loss are
// therefore (sequences, length - shift), in that order, and every per-row array has
// row_count(rows) entries. Where length <= shift there are none.
struct Rows {
  std::int64_t sequences = 1;
  std::int64_t length = 0;
  std::int64_t shift = 0;
  IndexType target_type = IndexType::i64;
  // Rows with this target do not count.
  std::int64_t ignore_index = -100;
  // How many rows are not ignored, where the host knows it. On CUDA the matrix library's products
  // then shrink to those rows, and a number that does not agree with the targets makes every output
  // NaN. The CPU counts for itself. Calls over logits refuse it.
  std::optional<std::int64_t> num_valid;
  // Each row has a temperature of its own, in Inputs::temperature or LogitsArgs::temperature.
  bool has_temperature = false;

  bool operator==(const Rows&) const = default;
};

// sequences * (length - shift), or 0 where length <= shift: the length of every per-row array.
std::int64_t row_count(const Rows& rows);

// Which classes of a vocabulary the logits are of: `count` of `total`, from class `first` on. A
// whole vocabulary of V classes is {0, V, V}, and a total of 0 means count. Anything else is a
// shard: its rows cannot be closed by itself, so Wanted::state must be asked for, and close_rows
// (rows.h) makes the rows' outputs from the states of all shards. Targets are those of the whole
// vocabulary. A shard of Logits is refused as unsupported.
struct Classes {
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t total = 0;

  bool operator==(const Classes&) const = default;
};

// The last layer of a model: E is (sequences, length, D), C is (count, D), the bias (count). The
// last dimension of E and C is contiguous. A stride of 0 means packed.
struct Head {
  Classes classes;
  std::int64_t D = 0;
  DType e_type = DType::f32;
  DType c_type = DType::f32;
  DType bias_type = DType::f32;
  bool has_bias = false;
  std::int64_t e_sequence_stride = 0;
  std::int64_t e_row_stride = 0;
  std::int64_t c_row_stride = 0;

  bool operator==(const Head&) const = default;
};

// Logits that are E C^T + bias, and are made as they are needed (make_plan, call.h).
struct Linear {
  Head head;

  bool operator==(const Linear&) const = default;
};

// Logits that exist already: (sequences, length, count), the last dimension contiguous (logits.h).
// A stride of 0 means packed.
struct Logits {
  Classes classes;
  DType type = DType::f32;
  std::int64_t sequence_stride = 0;
  std::int64_t row_stride = 0;
  // The gradient takes the logits' memory: LogitsArgs::gradient is then the address of the logits,
  // and its strides are theirs.
  bool overwrite = false;
  // How many blocks share a row on CUDA where its statistics are made: 1, 2, 4 or 8, where more
  // than 1 need sm_90 or later. The library chooses where it is 0; others are for tests and
  // measurements.
  int blocks_per_row = 0;

  bool operator==(const Logits&) const = default;
};

// Where logits come from.
using Source = std::variant<Linear, Logits>;

// From a logit of the source, a, to that of the softmax, z:
//   s = softcap * tanh(logit_scale * a / softcap)    (s = logit_scale * a without a softcap)
//   z = s / temperature
// The bias of a Linear source is added after logit_scale, before the softcap.
struct Transform {
  // It must be > 0.
  std::optional<double> softcap;
  // It must be finite and not 0.
  double logit_scale = 1.0;
  // It must be > 0. Where a row has a temperature of its own, the two are multiplied.
  double temperature = 1.0;

  bool operator==(const Transform&) const = default;
};

// A gradient that a call may be asked for.
struct GradientWanted {
  bool wanted = false;
  // Where it is not set, it is the dtype of what the gradient belongs to. With a Linear source it
  // may be the stat dtype (call.h) instead, the dtype of the sums, which are then not rounded.
  std::optional<DType> type;
  // The gradient is added to what lies in its memory instead of written over it. dC and dbias in
  // the stat dtype can be; anything else is refused as unsupported.
  bool add = false;

  bool operator==(const GradientWanted&) const = default;
};

// What is made beyond nll, row_max and log_sum, which are always made.
struct Wanted {
  // The statistics stay open: forward writes RowOutputs::state and no other output of a row. The
  // state holds what entropy, zbar and argmax need where they are wanted.
  bool state = false;
  bool entropy = false;
  bool zbar = false;
  bool argmax = false;

  // The gradients of a Linear source.
  GradientWanted de;
  GradientWanted dc;
  GradientWanted dbias;

  // The gradient of Logits: (sequences, length, count), with strides of its own. A stride of 0
  // means packed, or the logits' stride where these are overwritten.
  GradientWanted dlogits;
  std::int64_t dlogits_sequence_stride = 0;
  std::int64_t dlogits_row_stride = 0;

  bool operator==(const Wanted&) const = default;
};

// What is known of the upstream gradients beforehand.
struct UpstreamFacts {
  Upstream when = Upstream::none;
  // RowGradients::d_entropy may be given.
  bool entropy = false;
  // RowGradients::d_zbar may be given.
  bool zbar = false;

  bool operator==(const UpstreamFacts&) const = default;
};

struct Problem {
  Rows rows;
  Source source;
  Transform transform;
  Wanted wanted;
  UpstreamFacts upstream;

  // The dtype of the products' operands with a Linear source. f32 and bf16 accumulate in fp32, f64
  // in fp64; f64 takes f64 operands only. f16 rounds operands no further than they are stored.
  // Logits have no products, and take f32 or their own dtype here.
  DType compute_type = DType::f32;
  // fp32 products on CUDA may round their operands to tf32.
  bool allow_tf32 = false;
  // Inputs::class_weight or LogitsArgs::class_weight is given. It enters zbar and nothing else.
  bool has_class_weight = false;

  Device device = Device::cpu;
  // The index of the CUDA device, which must be the current one; -1 means the current one.
  int device_index = -1;

  // The members below are for plans, and must be left alone where the source is Logits.
  //
  // Bytes of memory, kept and workspace together, that a plan may ask for. Where it is not set,
  // that is 512 MiB, or what the smallest plan needs where that is more; on CUDA it is at least 4 N
  // D bytes and 128 MiB, and a copy of C in the products' dtype beside that where C has another
  // one.
  std::optional<std::int64_t> max_workspace;
  Schedule schedule = Schedule::automatic;
  // The engine that a plan must take. Where it is empty, the first that supports the problem does.
  std::string engine;

  bool operator==(const Problem&) const = default;
};

inline constexpr std::int64_t kDefaultWorkspace = std::int64_t{512} << 20;

std::int64_t row_count(const Problem& problem);

// The head of a Linear source, and the facts of Logits. Both throw Error(invalid_value) where the
// source is the other one.
const Head& head_of(const Problem& problem);
Head& head_of(Problem& problem);
const Logits& logits_of(const Problem& problem);
Logits& logits_of(Problem& problem);

// The classes, whichever the source is.
const Classes& classes_of(const Problem& problem);
Classes& classes_of(Problem& problem);

// Whether any gradient is wanted.
bool wants_gradient(const Problem& problem);

}  // namespace cutloss
