// The memory of a call, buffer by named buffer. A plan books the buffers, adds them up and prints
// them; a session finds its pointers by the same entries.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cutloss {

// How long a buffer must keep what it holds where another session continues in the same memory;
// tests overwrite everything else there. A session that takes several steps finds its operands
// where it left them, whatever their lifetime.
enum class Lifetime : std::uint8_t {
  step,  // within statistics, gradients or finish
  seam,  // from statistics to gradients of a chunk
  call,  // from begin to finish
  kept,  // from forward to backward
};
std::string_view name(Lifetime lifetime);

// One entry of a ledger. The names are literals of the components that book the buffers.
struct Booking {
  std::string_view name;
  std::int64_t bytes = 0;
  Lifetime lifetime = Lifetime::step;
  // The name of the memory that holds it where it has none of its own: another buffer of this
  // ledger, or a gradient ("dC"). It is empty where the buffer has its own.
  std::string_view lies_in = "";
  // The moment at which that memory is needed for its own purpose, in words.
  std::string_view until = "";
  // Bytes from the ledger's begin; -1 for a buffer in a gradient's memory.
  std::int64_t offset = 0;
};

// A ledger lays buffers one behind the other, in the order in which they are booked.
class Ledger {
 public:
  Ledger() = default;
  // Every buffer starts at a multiple of `alignment` bytes.
  explicit Ledger(std::int64_t alignment) : alignment_(alignment) {}

  void book(std::string_view name, std::int64_t bytes, Lifetime lifetime = Lifetime::step);
  // Books a buffer that lies in another one of this ledger, `from` bytes (a multiple of the
  // alignment) behind its begin; or in a gradient, where `lies_in` names no buffer. It may lie
  // there until that memory is needed for its own purpose. Throws Error(internal) where it does not
  // fit.
  void share(std::string_view name, std::int64_t bytes, std::string_view lies_in,
             std::string_view until, Lifetime lifetime = Lifetime::step, std::int64_t from = 0);

  // The buffer's place and its size. Both throw Error(internal) where no buffer has that name, and
  // `offset` also where it lies in a gradient.
  std::int64_t offset(std::string_view name) const;
  std::int64_t bytes_of(std::string_view name) const { return booking(name).bytes; }
  const Booking& booking(std::string_view name) const;
  // The bytes of all buffers together.
  std::int64_t bytes() const { return bytes_; }
  const std::vector<Booking>& bookings() const { return bookings_; }

 private:
  std::int64_t alignment_ = 64;
  std::int64_t bytes_ = 0;
  std::vector<Booking> bookings_;
};

// Lists the buffers in one line: "row list 8008 (call), logits 4194304, dE's sums 262144 (in ...
// until ...)".
std::string in_words(const Ledger& ledger);

}  // namespace cutloss
