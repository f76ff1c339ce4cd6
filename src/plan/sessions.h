// What sessions of every kind check of a chunk.
#pragma once

#include <string>

#include "core/text.h"
#include "cutloss/call.h"

namespace cutloss {

class CheckedSession : public Session {
 public:
  CheckedSession(std::int64_t chunk_count, Pass pass) : chunks_(chunk_count), pass_(pass) {}

  RowList rows(std::int64_t chunk) final {
    check(chunk);
    return rows_of(chunk);
  }
  void statistics(std::int64_t chunk) final {
    check(chunk);
    if (!makes_statistics(pass_)) refuse("statistics", "backward");
    make_statistics(chunk);
  }
  void gradients(std::int64_t chunk) final {
    check(chunk);
    if (!makes_gradients(pass_)) refuse("gradients", "forward");
    make_gradients(chunk);
  }

 protected:
  virtual RowList rows_of(std::int64_t chunk) = 0;
  virtual void make_statistics(std::int64_t chunk) = 0;
  // Algorithms that make none never open such a pass.
  virtual void make_gradients(std::int64_t) {
    throw Error(ErrorCode::internal, "a session without gradients was asked for some");
  }
  Pass pass() const { return pass_; }

 private:
  void check(std::int64_t chunk) const {
    if (chunk >= 0 && chunk < chunks_) return;
    throw Error(ErrorCode::invalid_value, text("chunk ", chunk, " is outside [0, ", chunks_, ")"));
  }
  [[noreturn]] static void refuse(const char* call, const char* pass) {
    throw Error(ErrorCode::invalid_value,
                text("Session::", call, ": the session was opened for Pass::", pass));
  }

  const std::int64_t chunks_;
  const Pass pass_;
};

}  // namespace cutloss
