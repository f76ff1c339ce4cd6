// With CUTLOSS_VERBOSE=1 in the environment each call prints its plan and its time to stderr.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>

#include "cutloss/cutloss.h"

namespace cutloss {

class CallReport {
 public:
  CallReport(const char* call, const Plan& plan) : call_(call), plan_(plan) {
    const char* wanted = std::getenv("CUTLOSS_VERBOSE");
    on_ = wanted != nullptr && std::string_view(wanted) != "0" && *wanted != '\0';
    if (on_) begin_ = Clock::now();
  }
  CallReport(const CallReport&) = delete;
  CallReport& operator=(const CallReport&) = delete;
  ~CallReport() {
    if (!on_) return;
    const std::chrono::duration<double, std::milli> time = Clock::now() - begin_;
    const bool failed = std::uncaught_exceptions() > exceptions_;
    try {
      std::fprintf(stderr, "cutloss %s%s, %.3f ms\n%s", call_, failed ? " failed" : "",
                   time.count(), describe(plan_).c_str());
    } catch (...) {  // no memory for a report: the call matters more
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  const char* call_;
  const Plan& plan_;
  bool on_ = false;
  int exceptions_ = std::uncaught_exceptions();
  Clock::time_point begin_;
};

}  // namespace cutloss
