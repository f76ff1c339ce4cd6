// What every component of a call holds: the decision, the pointers, and the memory that was booked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>

#include "core/dtype.h"
#include "cuda/decision.h"
#include "cuda/matrix.h"

namespace cutloss::cuda {

// The address `elements` past a base.
inline const void* at(const void* base, DType type, std::int64_t elements) {
  return static_cast<const std::byte*>(base) + elements * size_of(type);
}
inline void* at(void* base, DType type, std::int64_t elements) {
  return static_cast<std::byte*>(base) + elements * size_of(type);
}

struct Call {
  // Throws Error(invalid_value) where the plan is for another device than the current one.
  Call(std::shared_ptr<const Decision> decision, const Args& call_args, Pass call_pass)
      : held(std::move(decision)),
        d(on_current_device(static_cast<const CudaDecision&>(*held))),
        p(d.problem),
        head(head_of(d.problem)),
        args(call_args),
        pass(call_pass),
        workspace(pass == Pass::backward ? d.backward : d.forward),
        reads(d.reads(pass)),
        stream(static_cast<cudaStream_t>(call_args.stream)) {}

  // A buffer of the workspace. It must be booked.
  template <class U>
  U* buffer(std::string_view name) const {
    return reinterpret_cast<U*>(static_cast<std::byte*>(args.workspace) + workspace.offset(name));
  }
  // One that is kept.
  template <class U>
  U* kept(std::string_view name) const {
    return reinterpret_cast<U*>(static_cast<std::byte*>(args.kept) + d.kept.offset(name));
  }

  const std::shared_ptr<const Decision> held;
  const CudaDecision& d;
  const Problem& p;
  const Head& head;
  const Args args;
  const Pass pass;
  const Ledger& workspace;
  const Reads& reads;
  const cudaStream_t stream;
};

}  // namespace cutloss::cuda
