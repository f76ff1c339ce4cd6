// Losses over logits on a CUDA device, and the table of what CUDA devices do without a plan.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "core/dtype.h"
#include "core/folded_softcap.h"
#include "cuda/device.h"
#include "cuda/device_calls.h"
#include "cuda/logits/logits_rows.h"
#include "cuda/refusal.h"
#include "cuda/rows/row_facts.h"

#include "core/refuse.h"

namespace cutloss {
namespace {

cuda::RowFacts facts_of(const Problem& p, const LogitsArgs& args) {
  // Columns that a vector of 16 bytes holds beyond the last one must fit into 32 bits, too.
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 64;
  std::string refusal = cuda::index_refusal(p, cuda::current_device());
  if (refusal.empty()) refusal = cuda::size_refusal(p.rows, classes_of(p).total, kMost);
  if (!refusal.empty()) refuse(ErrorCode::unsupported, refusal);
  return cuda::row_facts(p, args.targets, args.temperature);
}

template <class T>
cuda::LogitRows<T> rows_of(const Problem& p, const LogitsArgs& args, Pass pass) {
  cuda::LogitRows<T> rows;
  rows.facts = facts_of(p, args);
  rows.positions = static_cast<int>(p.rows.sequences * p.rows.length);
  rows.logits = args.logits;
  rows.sequence_stride = logits_of(p).sequence_stride;
  rows.row_stride = logits_of(p).row_stride;
  rows.gradient = makes_gradients(pass) ? args.gradient : nullptr;
  rows.gradient_sequence_stride = p.wanted.dlogits_sequence_stride;
  rows.gradient_row_stride = p.wanted.dlogits_row_stride;
  rows.statistics = makes_statistics(pass);
  rows.rows = args.rows;
  // Outputs that are not wanted are not written, even where there is room. Backward reads the
  // entropy.
  const bool reads_entropy = !makes_statistics(pass) && args.upstream.d_entropy != nullptr;
  if (!p.wanted.entropy && !reads_entropy) rows.rows.entropy = nullptr;
  if (!p.wanted.zbar || !makes_statistics(pass)) rows.rows.zbar = rows.rows.zbar_centred = nullptr;
  if (!p.wanted.argmax || !makes_statistics(pass)) rows.rows.argmax = nullptr;
  if (makes_gradients(pass)) rows.upstream = args.upstream;
  rows.class_weight = static_cast<const T*>(args.class_weight);
  rows.softcap = static_cast<T>(folded_softcap(p));
  rows.logit_scale = static_cast<T>(p.transform.logit_scale);
  return rows;
}

}  // namespace

void cuda::logits(const Problem& p, const LogitsArgs& args, Pass pass) {
  auto* stream = static_cast<cudaStream_t>(args.stream);
  const int blocks = logits_of(p).blocks_per_row;
  switch (logits_of(p).type) {
    case DType::bf16:
      return cuda::run_logit_rows<__nv_bfloat16>(rows_of<float>(p, args, pass), blocks, stream);
    case DType::f16:
      return cuda::run_logit_rows<__half>(rows_of<float>(p, args, pass), blocks, stream);
    case DType::f32:
      return cuda::run_logit_rows<float>(rows_of<float>(p, args, pass), blocks, stream);
    case DType::f64:
      return cuda::run_logit_rows<double>(rows_of<double>(p, args, pass), blocks, stream);
  }
}

const DeviceCalls& cuda_calls() {
  static constexpr DeviceCalls calls{cuda::loss_terms,   cuda::sum_loss, cuda::close_rows,
                                     cuda::empty_states, cuda::logits,   cuda::scale};
  return calls;
}

}  // namespace cutloss
