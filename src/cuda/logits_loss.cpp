// Losses over logits on a device.
#include "core/logits_loss.h"

#include <limits>

#include "cuda/common/logits_rows.h"
#include "cuda/device.h"
#include "cuda/row_facts.h"

namespace cutloss {
namespace {

cuda::RowFacts facts_of(const Problem& p, const LogitsArgs& args) {
  // What a vector of 16 bytes holds beyond the last column must be a number, too.
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 64;
  std::string refusal = cuda::index_refusal(p.device_index);
  if (refusal.empty()) refusal = cuda::size_refusal(p.rows, classes_of(p).count, kMost);
  if (!refusal.empty()) throw Error(ErrorCode::unsupported, refusal);
  return cuda::row_facts(p, args.targets, args.temperature);
}

template <class T>
cuda::LogitRows<T> rows_of(const Problem& p, const LogitsArgs& args, Passes passes) {
  cuda::LogitRows<T> rows;
  rows.facts = facts_of(p, args);
  rows.positions = static_cast<int>(p.rows.sequences * p.rows.length);
  rows.logits = args.logits;
  rows.sequence_stride = logits_of(p).sequence_stride;
  rows.row_stride = logits_of(p).row_stride;
  rows.gradient = passes.backward ? args.gradient : nullptr;
  rows.gradient_sequence_stride = p.wanted.dlogits_sequence_stride;
  rows.gradient_row_stride = p.wanted.dlogits_row_stride;
  rows.statistics = passes.forward;
  rows.rows = args.rows;
  // What is not wanted is not written, even where there is room for it. Backward reads the entropy.
  const bool reads_entropy = !passes.forward && args.upstream.d_entropy != nullptr;
  if (!p.wanted.entropy && !reads_entropy) rows.rows.entropy = nullptr;
  if (!p.wanted.zbar || !passes.forward) rows.rows.zbar = nullptr;
  if (!p.wanted.argmax || !passes.forward) rows.rows.argmax = nullptr;
  if (passes.backward) rows.upstream = args.upstream;
  rows.class_weight = static_cast<const T*>(args.class_weight);
  rows.softcap = static_cast<T>(folded_softcap(p));
  rows.logit_scale = static_cast<T>(p.transform.logit_scale);
  return rows;
}

}  // namespace

void cuda_logits(const Problem& p, const LogitsArgs& args, Passes passes) {
  auto* stream = static_cast<cudaStream_t>(args.stream);
  const int blocks = logits_of(p).blocks_per_row;
  switch (logits_of(p).type) {
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

void cuda_weighted_loss(const Problem& p, const LogitsArgs& args, void* loss,
                        const bool* undefined) {
  auto* stream = static_cast<cudaStream_t>(args.stream);
  const cuda::RowFacts facts = facts_of(p, args);
  if (stat_type(p) == DType::f64) {
    return cuda::sum_loss<double>(facts, args.rows, args.upstream, undefined, loss, stream);
  }
  cuda::sum_loss<float>(facts, args.rows, args.upstream, undefined, loss, stream);
}

}  // namespace cutloss
