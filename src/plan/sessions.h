// What all sessions check, and how one is put together from an algorithm's steps and its engine's
// components.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "core/dtype.h"
#include "core/refuse.h"
#include "core/text.h"
#include "cutloss/call.h"
#include "plan/decision.h"

namespace cutloss {

// A session that checks the pass, the chunk, and the order of the steps.
class CheckedSession : public Session {
 public:
  CheckedSession(std::int64_t chunk_count, Pass pass) : chunks_(chunk_count), pass_(pass) {}

  // Notes that another session has begun in the same memory, and made the statistics of its last
  // chunk.
  void resume() { begun_ = resumed_ = true; }

  void begin() final {
    if (resumed_) refuse("begin", "the session continues another, which has begun");
    list_rows();
    begun_ = true;
  }
  RowList rows(std::int64_t chunk) final {
    check("rows", chunk);
    return rows_of(chunk);
  }
  void statistics(std::int64_t chunk) final {
    check("statistics", chunk);
    if (!makes_statistics(pass_)) refuse("statistics", "it was opened for Pass::backward");
    if (last_ < 0 && !resumed_ && chunk != 0) refuse("statistics", "chunk 0 comes first");
    make_statistics(chunk);
    last_ = chunk;
  }
  void gradients(std::int64_t chunk) final {
    check("gradients", chunk);
    need_gradients("gradients");
    if (pass_ == Pass::both && !resumed_ && chunk != last_) {
      refuse("gradients", text("the last statistics were not those of chunk ", chunk));
    }
    if (chunk <= last_gradients_) {
      refuse("gradients", text("those of chunk ", last_gradients_, " were made already, and chunk ",
                               chunk, " would be added to them once more"));
    }
    make_gradients(chunk);
    last_gradients_ = chunk;
  }
  void finish() final {
    need_begun("finish");
    need_gradients("finish");
    finish_gradients();
  }

 protected:
  virtual void list_rows() = 0;
  virtual RowList rows_of(std::int64_t chunk) = 0;
  virtual void make_statistics(std::int64_t chunk) = 0;
  virtual void make_gradients(std::int64_t chunk) = 0;
  virtual void finish_gradients() = 0;
  Pass pass() const { return pass_; }

 private:
  void check(const char* call, std::int64_t chunk) const {
    need_begun(call);
    if (chunk >= 0 && chunk < chunks_) return;
    refuse_value("chunk ", chunk, " is outside [0, ", chunks_, ")");
  }
  void need_begun(const char* call) const {
    if (!begun_) refuse(call, "begin was not called; resume continues a session that has begun");
  }
  void need_gradients(const char* call) const {
    if (!cutloss::makes_gradients(pass_)) refuse(call, "it was opened for Pass::forward");
  }
  [[noreturn]] static void refuse(const char* call, const std::string& why) {
    refuse_value("Session::", call, ": ", why);
  }

  const std::int64_t chunks_;
  const Pass pass_;
  bool begun_ = false;
  bool resumed_ = false;
  // The chunks whose statistics, and whose gradients, were made last.
  std::int64_t last_ = -1;
  std::int64_t last_gradients_ = -1;
};

// A session that takes an algorithm's Steps, over the components (Parts) of its engine:
//   static void statistics(Parts&, RowRange chunk, Pass);
//   static void gradients(Parts&, RowRange chunk, Pass);
// Neither is called for an empty chunk. Parts begin a call, list its rows and finish its gradients.
template <class Steps, class Parts>
class StepsSession final : public CheckedSession {
 public:
  StepsSession(std::shared_ptr<const Decision> decision, const Args& args, Pass pass)
      : CheckedSession(chunk_count(*decision), pass),
        decision_(decision),
        parts_(std::move(decision), args, pass) {}

 private:
  void list_rows() override { parts_.begin(); }
  RowList rows_of(std::int64_t chunk) override { return parts_.rows.entries(range(chunk)); }
  void make_statistics(std::int64_t chunk) override {
    if (const RowRange rows = range(chunk); rows.count > 0) {
      Steps::statistics(parts_, rows, pass());
    }
    // After the products: a device so begins with them sooner.
    if (chunk == 0) parts_.rows.clear_ignored();
  }
  void make_gradients(std::int64_t chunk) override {
    if (const RowRange rows = range(chunk); rows.count > 0) Steps::gradients(parts_, rows, pass());
  }
  void finish_gradients() override { parts_.sums.finish(); }

  RowRange range(std::int64_t chunk) const {
    return chunk_range(decision_->sizes, parts_.rows.to_cover(), chunk);
  }

  const std::shared_ptr<const Decision> decision_;
  Parts parts_;
};

// Opens a session (Algorithm::open) over components in the decision's stat dtype.
template <class Steps, template <class> class PartsOf>
std::unique_ptr<CheckedSession> open_steps(std::shared_ptr<const Decision> decision,
                                           const Args& args, Pass pass) {
  std::unique_ptr<CheckedSession> session;
  for_stat(decision->stat, [&]<class T>(T*) {
    session = std::make_unique<StepsSession<Steps, PartsOf<T>>>(std::move(decision), args, pass);
  });
  return session;
}

}  // namespace cutloss
