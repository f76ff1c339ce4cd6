#include "cuda/logits/logits_rows.cuh"

namespace cutloss::cuda {

void logit_rows_bf16(const LogitRows<float>& rows, int blocks_per_row, cudaStream_t stream) {
  run_logit_rows<__nv_bfloat16, float>(rows, blocks_per_row, stream);
}

}  // namespace cutloss::cuda
