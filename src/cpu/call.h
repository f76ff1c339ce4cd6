// What every component of a call holds: the decision, the pointers, and the memory that was booked.
#pragma once

#include <cstddef>
#include <memory>

#include "core/dtype.h"
#include "cpu/decision.h"
#include "cpu/rows/convert.h"

namespace cutloss::cpu {

struct Call {
  Call(std::shared_ptr<const Decision> decision, const Args& call_args, Pass call_pass)
      : held(std::move(decision)),
        d(static_cast<const CpuDecision&>(*held)),
        p(d.problem),
        head(head_of(d.problem)),
        args(call_args),
        pass(call_pass),
        workspace(pass == Pass::backward ? d.backward : d.forward) {}

  // A buffer of the workspace. It must be booked.
  template <class U>
  U* buffer(std::string_view name) const {
    return reinterpret_cast<U*>(static_cast<std::byte*>(args.workspace) + workspace.offset(name));
  }
  // One that is kept.
  std::byte* kept(std::string_view name) const {
    return static_cast<std::byte*>(args.kept) + d.kept.offset(name);
  }

  const std::shared_ptr<const Decision> held;
  const CpuDecision& d;
  const Problem& p;
  const Head& head;
  const Args args;
  const Pass pass;
  const Ledger& workspace;
};

}  // namespace cutloss::cpu
