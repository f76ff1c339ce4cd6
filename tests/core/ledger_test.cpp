// The ledger of a call's memory: what is booked, where it lies, and what it says of itself.
#include "core/ledger.h"

#include <gtest/gtest.h>

#include "cutloss/error.h"

namespace cutloss::test {
namespace {

TEST(Ledger, BuffersLieOneBehindTheOther) {
  Ledger ledger(64);
  ledger.book("rows", 24);
  ledger.book("logits", 130, Lifetime::seam);
  ledger.book("nothing", 0);
  ledger.book("sums", 64);
  EXPECT_EQ(ledger.offset("rows"), 0);
  EXPECT_EQ(ledger.offset("logits"), 64);
  EXPECT_EQ(ledger.offset("nothing"), 256);
  EXPECT_EQ(ledger.offset("sums"), 256);
  EXPECT_EQ(ledger.bytes_of("logits"), 130);
  EXPECT_EQ(ledger.bytes(), 320);
  EXPECT_EQ(ledger.bookings()[1].lifetime, Lifetime::seam);
}

TEST(Ledger, SharedMemoryTakesNone) {
  Ledger ledger(256);
  ledger.book("rows", 8);
  ledger.book("dE's sums", 1000);
  ledger.share("sums", 900, "dE's sums", "dE begins", Lifetime::seam);
  ledger.share("kept logits", 5000, "dC", "the slab is written");
  EXPECT_EQ(ledger.offset("sums"), ledger.offset("dE's sums"));
  EXPECT_THROW(ledger.offset("kept logits"), Error);  // it is dC's memory
  ledger.share("behind", 100, "dE's sums", "dE begins", Lifetime::step, 768);
  EXPECT_EQ(ledger.offset("behind"), ledger.offset("dE's sums") + 768);
  EXPECT_EQ(ledger.bytes(), 256 + 1024);
  EXPECT_EQ(
      in_words(ledger),
      "rows 8, dE's sums 1000, sums 900 (seam, in dE's sums until dE begins), kept logits 5000 "
      "(in dC until the slab is written), behind 100 (in dE's sums until dE begins)");
}

TEST(Ledger, RefusesWhatIsNotThere) {
  Ledger ledger;
  EXPECT_EQ(in_words(ledger), "nothing");
  EXPECT_EQ(ledger.bytes(), 0);
  EXPECT_THROW(ledger.offset("rows"), Error);
  ledger.book("rows", 8);
  EXPECT_THROW(ledger.bytes_of("row"), Error);
  EXPECT_THROW(ledger.share("too large", 9, "rows", "never"), Error);
  EXPECT_THROW(ledger.share("too far", 4, "rows", "never", Lifetime::step, 5), Error);
}

}  // namespace
}  // namespace cutloss::test
