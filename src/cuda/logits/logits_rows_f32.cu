#include "cuda/logits/logits_rows.cuh"

namespace cutloss::cuda {

void logit_rows_f32(const LogitRows<float>& rows, int blocks_per_row, cudaStream_t stream) {
  run_logit_rows<float, float>(rows, blocks_per_row, stream);
}

}  // namespace cutloss::cuda
