// A call of the CUDA engines.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/decision.h"
#include "plan/call.h"

namespace cutloss::cuda {

struct Call : CallOf<CudaDecision> {
  // Throws Error(invalid_value) where the plan is for another device than the current one.
  Call(std::shared_ptr<const Decision> decision, const Args& call_args, Pass call_pass)
      : CallOf(std::move(decision), call_args, call_pass),
        reads(d.reads(pass)),
        stream(static_cast<cudaStream_t>(args.stream)) {
    need_current_device(d);
  }

  const Reads& reads;
  const cudaStream_t stream;
};

}  // namespace cutloss::cuda
