#include "core/ledger.h"

#include <algorithm>
#include <array>

#include "core/refuse.h"
#include "core/sizes.h"
#include "core/text.h"
#include "cutloss/error.h"

namespace cutloss {
namespace {

auto named(const std::vector<Booking>& bookings, std::string_view name) {
  return std::find_if(bookings.begin(), bookings.end(),
                      [&](const Booking& b) { return b.name == name; });
}

}  // namespace

void Ledger::book(std::string_view name, std::int64_t bytes, Lifetime lifetime) {
  bookings_.push_back({name, bytes, lifetime, "", "", bytes_});
  bytes_ += round_up(bytes, alignment_);
}

void Ledger::share(std::string_view name, std::int64_t bytes, std::string_view lies_in,
                   std::string_view until, Lifetime lifetime, std::int64_t from) {
  const auto host = named(bookings_, lies_in);
  const bool inside = host != bookings_.end();
  if (inside && host->bytes < from + bytes) {
    refuse(ErrorCode::internal, "the buffer '", name, "' of ", bytes, " bytes does not fit into '",
           lies_in, "' of ", host->bytes);
  }
  bookings_.push_back({name, bytes, lifetime, lies_in, until, inside ? host->offset + from : -1});
}

std::int64_t Ledger::offset(std::string_view name) const {
  const Booking& b = booking(name);
  if (b.offset < 0) {
    refuse(ErrorCode::internal, "the buffer '", name, "' lies in ", b.lies_in);
  }
  return b.offset;
}

const Booking& Ledger::booking(std::string_view name) const {
  const auto found = named(bookings_, name);
  if (found == bookings_.end()) {
    refuse(ErrorCode::internal, "the call's memory has no buffer '", name, "'");
  }
  return *found;
}

std::string_view name(Lifetime lifetime) {
  constexpr std::array<std::string_view, 4> names{"step", "seam", "call", "kept"};
  return names.at(static_cast<std::size_t>(lifetime));
}

std::string in_words(const Ledger& ledger) {
  std::string out;
  for (const Booking& b : ledger.bookings()) {
    out += text(out.empty() ? "" : ", ", b.name, " ", b.bytes);
    std::string facts;
    if (b.lifetime != Lifetime::step) facts += name(b.lifetime);
    if (!b.lies_in.empty()) {
      facts += text(facts.empty() ? "" : ", ", "in ", b.lies_in, " until ", b.until);
    }
    if (!facts.empty()) out += text(" (", facts, ")");
  }
  return out.empty() ? "nothing" : out;
}

}  // namespace cutloss
