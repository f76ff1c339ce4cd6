// The memory of a call, buffer by named buffer: what a plan books, adds up and prints is what a
// session finds its pointers by.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cutloss {

// How long a buffer must keep what it holds where another session goes on in the same memory: tests
// write over the rest then. A session that takes several steps finds its operands where it left
// them.
enum class Lifetime : std::uint8_t {
  step,  // within statistics, gradients or finish
  seam,  // from statistics to gradients of a chunk
  call,  // from begin to finish
  kept,  // from forward to backward
};
std::string_view name(Lifetime lifetime);

// One entry. Names are literals of the components that book them.
struct Booking {
  std::string_view name;
  std::int64_t bytes = 0;
  Lifetime lifetime = Lifetime::step;
  // The name of the memory that holds it where it has none of its own: another buffer of this
  // ledger, or a gradient ("dC"). Empty: it has its own.
  std::string_view lies_in = "";
  // When that memory is needed for what it is there for.
  std::string_view until = "";
  // From the ledger's begin; -1 in a gradient's memory.
  std::int64_t offset = 0;
};

// Buffers one behind the other, in the order in which they are booked.
class Ledger {
 public:
  Ledger() = default;
  // Every buffer starts at a multiple of so many bytes.
  explicit Ledger(std::int64_t alignment) : alignment_(alignment) {}

  void book(std::string_view name, std::int64_t bytes, Lifetime lifetime = Lifetime::step);
  // Books a buffer that lies in another of this ledger, or, where `lies_in` names none, in a
  // gradient, until that memory is needed itself; `from` bytes behind its begin, a multiple of the
  // alignment. Throws Error(internal) where it does not fit.
  void share(std::string_view name, std::int64_t bytes, std::string_view lies_in,
             std::string_view until, Lifetime lifetime = Lifetime::step, std::int64_t from = 0);

  // The buffer's place and size. Both throw Error(internal) where there is none of that name, and
  // `offset` where it lies in a gradient.
  std::int64_t offset(std::string_view name) const;
  std::int64_t bytes_of(std::string_view name) const { return booking(name).bytes; }
  const Booking& booking(std::string_view name) const;
  // What all of it takes.
  std::int64_t bytes() const { return bytes_; }
  const std::vector<Booking>& bookings() const { return bookings_; }

 private:
  std::int64_t alignment_ = 64;
  std::int64_t bytes_ = 0;
  std::vector<Booking> bookings_;
};

// The buffers in one line: "row list 8008 (call), z 4194304, dE's sums 262144 (in ... until ...)".
std::string in_words(const Ledger& ledger);

}  // namespace cutloss
