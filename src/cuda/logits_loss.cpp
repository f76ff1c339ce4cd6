// Losses over logits on a device.
#include "core/logits_loss.h"

#include <limits>

#include "core/text.h"
#include "core/validate.h"
#include "cuda/common/logits_rows.h"

namespace cutloss {
namespace {

cuda::RowFacts facts_of(const LogitsProblem& p, const LogitsArgs& args) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  // What a vector of 16 bytes holds beyond the last column must be a number, too.
  if (p.sequences * p.length > kMost || p.V > kMost - 64) {
    throw Error(ErrorCode::unsupported, text("sequences x length = ", p.sequences * p.length,
                                             " and V = ", p.V, " must be under 2^31"));
  }
  cuda::RowFacts facts;
  facts.targets = args.targets;
  facts.target_type = p.target_type;
  facts.ignore_index = p.ignore_index;
  facts.rows = static_cast<int>(row_count(p));
  facts.predicted = static_cast<int>(p.length - p.shift);
  facts.length = static_cast<int>(p.length);
  facts.shift = static_cast<int>(p.shift);
  facts.V = static_cast<int>(p.V);
  facts.temperature = p.has_row_temperature ? args.temperature : nullptr;
  facts.temperature_scale = p.temperature;
  const auto [least, most] = usable_range(stat_type_of(p));
  facts.least = least;
  facts.most = most;
  return facts;
}

template <class T>
cuda::LogitRows<T> rows_of(const LogitsProblem& p, const LogitsArgs& args, Passes passes) {
  cuda::LogitRows<T> rows;
  rows.facts = facts_of(p, args);
  rows.positions = static_cast<int>(p.sequences * p.length);
  rows.logits = args.logits;
  rows.sequence_stride = p.sequence_stride;
  rows.row_stride = p.row_stride;
  rows.gradient = passes.backward ? args.gradient : nullptr;
  rows.gradient_sequence_stride = p.gradient_sequence_stride;
  rows.gradient_row_stride = p.gradient_row_stride;
  rows.statistics = passes.forward;
  rows.rows = args.rows;
  // What is not wanted is not written, even where there is room for it. Backward reads the entropy.
  const bool reads_entropy = !passes.forward && args.upstream.d_entropy != nullptr;
  if (!p.wants_entropy && !reads_entropy) rows.rows.entropy = nullptr;
  if (!p.wants_zbar || !passes.forward) rows.rows.zbar = rows.rows.zbar_centred = nullptr;
  if (!p.wants_argmax || !passes.forward) rows.rows.argmax = nullptr;
  if (passes.backward) rows.upstream = args.upstream;
  rows.class_weight = static_cast<const T*>(args.class_weight);
  rows.softcap = static_cast<T>(folded_softcap(p));
  rows.logit_scale = static_cast<T>(p.logit_scale);
  return rows;
}

}  // namespace

void cuda_logits(const LogitsProblem& p, const LogitsArgs& args, Passes passes) {
  auto* stream = static_cast<cudaStream_t>(args.stream);
  const int blocks = p.blocks_per_row;
  switch (p.type) {
    case DType::bf16:
      return cuda::logit_rows_bf16(rows_of<float>(p, args, passes), blocks, stream);
    case DType::f16:
      return cuda::logit_rows_f16(rows_of<float>(p, args, passes), blocks, stream);
    case DType::f32:
      return cuda::logit_rows_f32(rows_of<float>(p, args, passes), blocks, stream);
    case DType::f64:
      return cuda::logit_rows_f64(rows_of<double>(p, args, passes), blocks, stream);
  }
}

void cuda_weighted_loss(const LogitsProblem& p, const LogitsArgs& args, void* loss,
                        const bool* undefined) {
  auto* stream = static_cast<cudaStream_t>(args.stream);
  const cuda::RowFacts facts = facts_of(p, args);
  if (stat_type_of(p) == DType::f64) {
    return cuda::sum_loss<double>(facts, args.rows, args.upstream, undefined, loss, stream);
  }
  cuda::sum_loss<float>(facts, args.rows, args.upstream, undefined, loss, stream);
}

}  // namespace cutloss
