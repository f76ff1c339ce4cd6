// CUTLOSS_VERBOSE: what a call does, on stderr, and nothing unless asked.
#include <cstdlib>

#include "engines.h"

namespace cutloss::test {
namespace {

std::string stderr_of_a_call(const char* verbose) {
  verbose == nullptr ? unsetenv("CUTLOSS_VERBOSE") : setenv("CUTLOSS_VERBOSE", verbose, 1);
  const Data data = make_data(with_size(1, 9, 50, 8));
  testing::internal::CaptureStderr();
  run(plan_for(data.problem, engine_names().back(), kModes[4]), data);
  unsetenv("CUTLOSS_VERBOSE");
  return testing::internal::GetCapturedStderr();
}

TEST(Verbose, SaysWhatEachCallDoes) {
  const std::string text = stderr_of_a_call("1");
  for (const char* part : {"cutloss forward, ", "cutloss backward, ", " ms\n", "N 9", "V 50", "D 8",
                           "schedule vocabulary", "workspace"}) {
    EXPECT_NE(text.find(part), std::string::npos) << "no '" << part << "' in\n" << text;
  }
}

TEST(Verbose, IsSilentUnlessAsked) {
  for (const char* verbose : {static_cast<const char*>(nullptr), "", "0"}) {
    EXPECT_EQ(stderr_of_a_call(verbose), "");
  }
}

}  // namespace
}  // namespace cutloss::test
