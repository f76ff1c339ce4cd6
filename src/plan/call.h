// What every component of a call holds: the decision, the pointers, and the memory that was booked.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include "core/dtype.h"
#include "cutloss/call.h"
#include "plan/buffers.h"
#include "plan/decision.h"

namespace cutloss {

// Decided: the engine's own kind of Decision.
template <class Decided>
struct CallOf {
  CallOf(std::shared_ptr<const Decision> decision, const Args& call_args, Pass call_pass)
      : held(std::move(decision)),
        d(static_cast<const Decided&>(*held)),
        p(d.problem),
        head(head_of(d.problem)),
        args(call_args),
        pass(call_pass),
        workspace(pass == Pass::backward ? d.backward : d.forward) {}
  CallOf(const CallOf&) = delete;
  CallOf& operator=(const CallOf&) = delete;

  // A buffer of the workspace. It must be booked.
  template <class U>
  U* buffer(std::string_view name) const {
    return reinterpret_cast<U*>(static_cast<std::byte*>(args.workspace) + workspace.offset(name));
  }
  // A buffer that is kept. It must be booked.
  template <class U>
  U* kept(std::string_view name) const {
    return reinterpret_cast<U*>(static_cast<std::byte*>(args.kept) + d.kept.offset(name));
  }

  // The rows of dC from a column of the vocabulary on.
  void* dc(std::int64_t column) const { return at(args.gradients.dc, d.dc_type, column * head.D); }
  // Where dE of a chunk accumulates, (rows, D) packed: in the output, row after row of the list, in
  // dC's last rows, or in the workspace.
  template <class T>
  T* de_sums(RowRange chunk) const {
    if (d.de_in_place) return static_cast<T*>(args.gradients.de) + chunk.begin * head.D;
    if (d.has_de_sums_in_dc()) return static_cast<T*>(sums_in_dc(d, args.gradients.dc));
    return buffer<T>(buffer::kDeSums);
  }
  // Where dC of some columns accumulates, if it has sums: one slab's, or the whole vocabulary's.
  template <class T>
  T* dc_sums(Columns columns) const {
    return buffer<T>(buffer::kDcSums) + (d.one_chunk ? 0 : columns.begin * head.D);
  }

  const std::shared_ptr<const Decision> held;
  const Decided& d;
  const Problem& p;
  const Head& head;
  const Args args;
  const Pass pass;
  const Ledger& workspace;
};

}  // namespace cutloss
