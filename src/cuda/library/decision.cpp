#include "cuda/library/decision.h"

#include <algorithm>
#include <vector>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/text.h"
#include "cuda/gradient_sums.h"
#include "cuda/library/kernels.h"
#include "cuda/library/tuning.h"
#include "plan/chunking.h"

namespace cutloss::cuda::library {
namespace {

// How much of E and C is converted at a time: less where memory is short.
struct Room {
  bool whole_e = true;
  std::int64_t c_columns = 0;
};

// The roomiest choice first; the last is the least. For every decision of a problem there are as
// many.
std::vector<Room> rooms(const CudaDecision& d, Pass pass) {
  const std::int64_t V = classes_of(d.problem).count;
  const std::int64_t least = std::min(pass == Pass::backward ? d.sizes.slab : d.forward_slab, V);
  if (!d.converts_c) return {{true, least}, {false, least}};
  return {{true, V}, {true, std::clamp(kSomeColumns, least, V)}, {true, least}, {false, least}};
}

Reads reads_of(const CudaDecision& d, Way way, Pass pass, Room room) {
  Reads reads;
  reads.e_in_place = reads_e_in_place(d, way, pass);
  reads.e_in_de = packs_e_in_de(d, way, pass);
  reads.whole_e = room.whole_e;
  reads.c_columns = room.c_columns;
  reads.compact = d.problem.rows.num_valid.has_value() || !reads.e_in_place;
  return reads;
}

// All but the matrix library's own.
Ledger workspace(const CudaDecision& d, Way way, Pass pass, const Reads& reads) {
  const Problem& p = d.problem;
  const Sizes& s = d.sizes;
  const std::int64_t operand = size_of(d.operand), stat = size_of(d.stat);
  const std::int64_t e_bytes = e_stride(p, d.operand) * operand;
  const bool from_kept = way.schedule == Schedule::rows;
  const bool again = pass == Pass::backward;
  const std::int64_t block_rows = again ? s.block_rows : d.forward_rows;
  const std::int64_t slab = again ? s.slab : d.forward_slab;
  const std::int64_t state =
      d.stat == DType::f64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
  Ledger ledger(kAlign);
  book_rows(ledger, d);
  if (makes_statistics(pass)) ledger.book(buffer::kStates, s.chunk_rows * state);
  if (d.converts_bias) ledger.book(buffer::kBias, classes_of(p).count * stat, Lifetime::call);
  if (!reads.e_in_place && !reads.e_in_de) {
    const std::int64_t block = std::max(block_rows, makes_gradients(pass) ? s.gradient_rows : 0);
    const std::int64_t rows = reads.whole_e ? s.chunk_rows : std::min(block, s.chunk_rows);
    ledger.book(buffer::kE, rows * e_bytes);
  }
  if (d.converts_c) {
    const bool once = reads.c_columns >= classes_of(p).count;
    ledger.book(buffer::kC, reads.c_columns * e_bytes, once ? Lifetime::call : Lifetime::step);
  }
  if (makes_gradients(pass) && reads.e_in_de) {
    ledger.share(buffer::kE, s.chunk_rows * head_of(p).D * operand, "dE", "dE is written");
  }
  if (makes_statistics(pass) || !from_kept) {
    ledger.book(buffer::kZ, block_rows * padded(slab, d.stat) * stat);
  }
  if (!makes_gradients(pass)) return ledger;
  if (d.operand == DType::f16) ledger.book(buffer::kScalars, sizeof(DeviceScalars));
  ledger.book(buffer::kCoefficients, s.chunk_rows * 8 * stat);
  if (!d.g_in_kept) book_g(ledger, d, reads);
  book_sums(ledger, d, /*always_de_sums=*/false);
  return ledger;
}

Ledger kept(const CudaDecision& d, Way way) {
  Ledger ledger(kAlign);
  if (way.schedule != Schedule::rows) return ledger;
  const Lifetime life = way.keeps_logits ? Lifetime::kept : Lifetime::seam;
  const std::int64_t rows = d.sizes.chunk_rows;
  ledger.book(buffer::kKept,
              rows * padded(classes_of(d.problem).count, d.kept_type) * size_of(d.kept_type), life);
  if (d.keeps_exponentials) {
    ledger.book(buffer::kMaxima, rows * pieces(d) * size_of(d.stat), life);
  }
  return ledger;
}

// Bytes of a trial whose sizes are set.
struct Bytes {
  std::int64_t kept = 0, forward = 0, backward = 0;
  std::int64_t peak() const { return kept + std::max(forward, backward); }
};
std::int64_t bytes_of(const CudaDecision& d, Way way, Pass pass, std::size_t room,
                      std::int64_t library_bytes) {
  const Reads reads = reads_of(d, way, pass, rooms(d, pass)[room]);
  return workspace(d, way, pass, reads).bytes() + library_bytes;
}
Bytes bytes_of(const CudaDecision& d, Way way, std::size_t room, std::int64_t library_bytes) {
  const auto of = [&](Pass pass) { return bytes_of(d, way, pass, room, library_bytes); };
  return {kept(d, way).bytes(), of(first_pass(way)), has_backward(way) ? of(Pass::backward) : 0};
}

// Books a pass in so many bytes: the roomiest choice that fits, and the rest for the matrix
// library.
Ledger settle(CudaDecision& d, Way way, Pass pass, std::int64_t bytes, Reads& reads) {
  for (const Room room : rooms(d, pass)) {
    reads = reads_of(d, way, pass, room);
    Ledger ledger = workspace(d, way, pass, reads);
    if (ledger.bytes() > bytes) continue;
    ledger.book(buffer::kLibrary, bytes - ledger.bytes());
    return ledger;
  }
  throw Error(ErrorCode::internal, text("a pass does not fit into its own ", bytes, " bytes"));
}

void settle(CudaDecision& d, Way way, const Bytes& bytes) {
  d.kept = kept(d, way);
  d.forward = settle(d, way, first_pass(way), bytes.forward, d.forward_reads);
  if (has_backward(way)) {
    d.backward = settle(d, way, Pass::backward, bytes.backward, d.backward_reads);
  }
}

// Sizes of a block of logits.
void set_block(CudaDecision& d, const Step& step) {
  Sizes& s = d.sizes;
  const std::int64_t numbers = step.logit_bytes / size_of(d.stat);
  s.block_rows = even_piece(s.chunk_rows, step.block_rows, 128);
  const std::int64_t beside = numbers / round_up(s.block_rows, 128);
  const std::int64_t unit = beside >= 1024 ? 1024 : 128;
  s.slab = even_piece(classes_of(d.problem).count,
                      std::max<std::int64_t>(beside / unit * unit, 128), unit);
  d.forward_rows = s.block_rows;
  d.forward_slab = s.slab;
}

bool has_quick_enough_memory(const Step& step, const DeviceFacts& device) {
  return step.logit_bytes <= kL2Block || device.memory_rate >= kQuickMemory;
}

// One step of the table, in one of its rooms.
class Search {
 public:
  Search(const CudaDecision& facts, const DeviceFacts& device, Way way, const Step& step,
         std::int64_t budget, std::int64_t& least)
      : facts_(facts),
        device_(device),
        way_(way),
        step_(step),
        budget_(budget),
        least_(least),
        rows_(std::max<std::int64_t>(row_count(facts.problem), 1)),
        V_(classes_of(facts.problem).count) {}

  // Null where nothing fits.
  std::shared_ptr<const Decision> find() const {
    if (in_one_call(way_) && step_.gradient_rows != 0) return nullptr;  // as the step before
    const std::size_t choices = rooms(attempt(rows_, 0, V_, 0).d, first_pass(way_)).size();
    for (std::size_t room = 0; room < choices; ++room) {
      Trial found = in_one_call(way_)                 ? find_chunk(room)
                    : way_.schedule == Schedule::none ? attempt(rows_, 0, V_, room)
                                                      : find_slab(room);
      if (found.bytes.peak() > budget_) continue;
      const double slower =
          way_.schedule == Schedule::vocabulary ? widen_forward(found, room) : step_.slower;
      auto d = std::make_shared<CudaDecision>(found.d);
      settle(*d, way_, found.bytes);
      d->predicted_time = predicted_time(*d) + slower - step_.slower;
      return d;
    }
    return nullptr;
  }

 private:
  struct Trial {
    CudaDecision d;
    Bytes bytes;
  };

  // Chunks of so many rows, gradients of so many columns at a time (0: as the way has it), and dE's
  // sums in dC from a column on.
  Trial attempt(std::int64_t chunk, std::int64_t slab, std::int64_t last_begin,
                std::size_t room) const {
    Trial t{facts_, {}};
    Sizes& s = t.d.sizes;
    s.chunk_rows = even_piece(rows_, chunk, 128);
    set_block(t.d, step_);
    const bool whole_rows = in_one_call(way_) || step_.gradient_rows == 0;
    s.gradient_rows = way_.schedule == Schedule::none ? s.block_rows
                      : whole_rows                    ? s.chunk_rows
                                   : even_piece(s.chunk_rows, step_.gradient_rows, 128);
    s.gradient_slab = way_.schedule == Schedule::none ? s.slab
                      : slab == 0                     ? V_
                                                      : even_piece(V_, slab, s.slab);
    t.d.last.begin = last_begin;
    set_places(t.d, way_);
    if (in_one_call(way_) && !t.d.g_in_kept) set_chunk_slab(t.d);
    set_last(t.d, way_);
    set_places(t.d, way_);
    t.bytes = bytes_of(t.d, way_, room, step_.library_bytes);
    least_ = std::min(least_, t.bytes.peak());
    return t;
  }

  // Forward takes the largest blocks of logits that fit: g is not there yet. Its product's time.
  double widen_forward(Trial& t, std::size_t room) const {
    for (const Step& step : kSteps) {
      if (step.logit_bytes <= step_.logit_bytes) break;
      if (!has_quick_enough_memory(step, device_)) continue;
      CudaDecision wide = t.d;
      set_block(wide, step);
      const std::int64_t bytes = bytes_of(wide, way_, Pass::forward, room, step.library_bytes);
      if (bytes > budget_) continue;
      t.d.forward_rows = wide.forward_rows;
      t.d.forward_slab = wide.forward_slab;
      t.bytes.forward = bytes;
      return step.slower;
    }
    return step_.slower;
  }

  // Gradients are made with the forward, a chunk at a time.
  Trial find_chunk(std::size_t room) const {
    const auto of = [&](std::int64_t chunk) { return attempt(chunk, 0, V_, room); };
    const std::int64_t chunk =
        largest_that_fits(step_.least_chunk, kMostChunk, 128, budget_,
                          [&](std::int64_t size) { return of(size).bytes.peak(); });
    Trial whole = of(rows_);
    const bool fits = whole.bytes.peak() <= budget_;
    if (chunk == 0 || rows_ <= step_.least_chunk) return whole;
    Trial parts = of(chunk);
    // The whole in one chunk, or chunks of enough rows: the smaller of the two.
    const bool smaller = chunk >= kGoodChunk && parts.bytes.peak() < whole.bytes.peak();
    return !fits || smaller ? std::move(parts) : std::move(whole);
  }

  // g of a chunk has a place of its own: a few slabs of logits.
  void set_chunk_slab(CudaDecision& d) const {
    Sizes& s = d.sizes;
    const std::int64_t numbers = step_.logit_bytes / size_of(d.stat) / s.chunk_rows;
    const std::int64_t count = std::min(kChunkSlab, numbers) / s.slab;
    s.gradient_slab = even_piece(V_, std::max<std::int64_t>(count, 1) * s.slab, s.slab);
  }

  // Gradients a slab of columns at a time, the widest that fits.
  Trial find_slab(std::size_t room) const {
    const std::int64_t unit = attempt(rows_, 0, V_, room).d.sizes.slab;
    const std::int64_t least = std::min(round_up(step_.least_slab, unit), round_up(V_, unit));
    const std::int64_t most = std::max(least, std::min(V_, kMostSlab) / unit * unit);
    const auto widest = [&](std::int64_t chunk, std::int64_t last_begin) {
      const std::int64_t slab = largest_that_fits(
          least, most, unit, budget_,
          [&](std::int64_t size) { return attempt(chunk, size, last_begin, room).bytes.peak(); });
      return attempt(chunk, std::max(slab, least), last_begin, room);
    };
    if (way_.keeps_logits) return widest(rows_, V_);
    return with_sums_placed(
        facts_, {budget_, facts_.de_in_place, 128, step_.least_chunk, 128}, widest,
        [&](std::int64_t rows) { return attempt(rows, least, V_, room).bytes.peak(); },
        [](const Trial& t) { return t.bytes.peak(); },
        [&](const Trial& t) { return predicted_time(t.d); });
  }

  double predicted_time(const CudaDecision& d) const {
    const Problem& p = facts_.problem;
    double time = products_of(p, way_) * step_.slower;
    const Sizes& s = d.sizes;
    if (p.wanted.de.wanted && way_.schedule == Schedule::vocabulary) {
      time += passes_over_sums(kFlopsPerByte, divide_up(V_, s.gradient_slab), V_);
    }
    if (p.wanted.dc.wanted) {
      time += passes_over_sums(kFlopsPerByte, divide_up(rows_, s.gradient_rows), rows_);
    }
    return time + static_cast<double>(V_ - d.last.begin) / static_cast<double>(V_);
  }

  const CudaDecision& facts_;
  const DeviceFacts& device_;
  const Way way_;
  const Step& step_;
  const std::int64_t budget_;
  std::int64_t& least_;
  const std::int64_t rows_, V_;
};

}  // namespace

std::int64_t pieces_per_slab(const CudaDecision& d) {
  const std::int64_t columns = d.stat == DType::f64 ? kPieceColumns<double> : kPieceColumns<float>;
  return divide_up(d.sizes.slab, columns);
}

std::int64_t pieces(const CudaDecision& d) {
  return divide_up(classes_of(d.problem).count, d.sizes.slab) * pieces_per_slab(d);
}

std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& p,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least) {
  const Way way = algorithm.way;
  CudaDecision facts;
  set_facts(facts, algorithm, p, device);
  for (const Step& step : kSteps) {
    if (!has_quick_enough_memory(step, device)) continue;
    if (auto found = Search(facts, device, way, step, budget, least).find()) return found;
  }
  return nullptr;
}

}  // namespace cutloss::cuda::library
