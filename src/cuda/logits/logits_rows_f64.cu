#include "cuda/logits/logits_rows.cuh"

namespace cutloss::cuda {

void logit_rows_f64(const LogitRows<double>& rows, int blocks_per_row, cudaStream_t stream) {
  run_logit_rows<double, double>(rows, blocks_per_row, stream);
}

}  // namespace cutloss::cuda
