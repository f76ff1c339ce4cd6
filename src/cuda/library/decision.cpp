#include "cuda/library/decision.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/text.h"
#include "cuda/common/kernels.h"
#include "cuda/device.h"
#include "cuda/gradient_sums.h"
#include "cuda/library/tuning.h"

namespace cutloss::cuda::library {
namespace {

// How much of E and C is converted at a time: less where memory is short.
struct Room {
  bool whole_e = true;
  std::int64_t c_columns = 0;
};

// The roomiest choice first; the last is the least. For every decision of a problem there are as
// many.
std::vector<Room> rooms(const CudaDecision& d) {
  const std::int64_t V = classes_of(d.problem).count;
  const std::int64_t least = std::min(d.sizes.slab, V);
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
  const std::int64_t state =
      d.stat == DType::f64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
  Ledger ledger(kAlign);
  book_rows(ledger, d);
  if (makes_statistics(pass)) ledger.book(buffer::kStates, s.chunk_rows * state);
  if (d.converts_bias) ledger.book(buffer::kBias, classes_of(p).count * stat);
  if (!reads.e_in_place && !reads.e_in_de) {
    const std::int64_t block = std::max(s.block_rows, makes_gradients(pass) ? s.gradient_rows : 0);
    const std::int64_t rows = reads.whole_e ? s.chunk_rows : std::min(block, s.chunk_rows);
    const bool stays = reads.whole_e && pass == Pass::both;
    ledger.book(buffer::kE, rows * e_bytes, stays ? Lifetime::seam : Lifetime::call);
  }
  if (d.converts_c) ledger.book(buffer::kC, reads.c_columns * e_bytes);
  if (makes_statistics(pass) || !from_kept) {
    ledger.book(buffer::kZ, s.block_rows * padded(s.slab, d.stat) * stat);
  }
  if (!makes_gradients(pass)) return ledger;
  if (d.operand == DType::f16) ledger.book(buffer::kScalars, sizeof(DeviceScalars));
  ledger.book(buffer::kCoefficients, s.chunk_rows * 8 * stat);
  if (!d.g_in_kept) {
    ledger.book(buffer::kG, s.gradient_rows * padded(s.gradient_slab, d.operand) * operand);
  }
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
Bytes bytes_of(const CudaDecision& d, Way way, Room room, std::int64_t library_bytes) {
  const auto of = [&](Pass pass) {
    return workspace(d, way, pass, reads_of(d, way, pass, room)).bytes() + library_bytes;
  };
  return {kept(d, way).bytes(), of(first_pass(way)), has_backward(way) ? of(Pass::backward) : 0};
}

// Books a pass in so many bytes: the roomiest choice that fits, and the rest for the matrix
// library.
Ledger settle(CudaDecision& d, Way way, Pass pass, std::int64_t bytes, Reads& reads) {
  for (const Room room : rooms(d)) {
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
}

// Chunks of rows, the most first.
std::vector<std::int64_t> chunks(std::int64_t rows, const Step& step) {
  std::vector<std::int64_t> sizes = {std::max<std::int64_t>(rows, 1)};
  const std::int64_t most = std::min(kMostChunk, round_up(rows, 128) - 128);
  std::int64_t last = rows;
  for (std::int64_t size = most; size >= step.least_chunk; size -= 128) {
    const std::int64_t even = even_piece(rows, size, 128);
    if (even < last) sizes.push_back(even);
    last = even;
  }
  return sizes;
}

// Slabs of gradients, the widest first. Each is made of whole slabs of logits.
std::vector<std::int64_t> slabs(const CudaDecision& d, const Step& step) {
  const std::int64_t V = classes_of(d.problem).count, slab = d.sizes.slab;
  std::vector<std::int64_t> sizes;
  for (std::int64_t count = std::max<std::int64_t>(1, std::min(V, kMostSlab) / slab);;
       count = std::max<std::int64_t>(1, count * 7 / 8)) {
    const std::int64_t even = even_piece(V, count * slab, slab);
    if (even >= std::min(step.least_slab, V) && (sizes.empty() || even < sizes.back())) {
      sizes.push_back(even);
    }
    if (count == 1) return sizes;
  }
}

// One step's search for sizes within a budget. Notes the least that was tried.
class Search {
 public:
  Search(Way way, const Step& step, std::int64_t budget, std::int64_t& least)
      : way_(way), step_(step), budget_(budget), least_(least) {}

  // Settles the decision; false where nothing fits.
  bool find(CudaDecision& d) const {
    d.sizes.chunk_rows = std::max<std::int64_t>(row_count(d.problem), 1);
    set_block(d, step_);
    const bool in_chunks = in_one_call(way_);
    if (in_chunks && step_.gradient_rows != 0) return false;  // as the step before
    const std::size_t choices = rooms(d).size();
    for (std::size_t room = 0; room < choices; ++room) {
      if (in_chunks ? find_chunk(d, room) : find_slab(d, room)) return true;
    }
    return false;
  }

 private:
  // Gradients are made with the forward, a chunk at a time.
  bool find_chunk(CudaDecision& d, std::size_t room) const {
    const std::int64_t rows = row_count(d.problem), V = classes_of(d.problem).count;
    CudaDecision best = d;
    Bytes best_bytes;
    bool found = false;
    for (const std::int64_t chunk : chunks(rows, step_)) {
      CudaDecision trial = d;
      trial.sizes.chunk_rows = trial.sizes.gradient_rows = chunk;
      set_block(trial, step_);
      trial.sizes.gradient_slab = V;
      set_places(trial, way_);
      if (!trial.g_in_kept) set_chunk_slab(trial);
      const Bytes bytes = try_bytes(trial, room);
      if (bytes.peak() > budget_) continue;
      // The whole in one chunk, or chunks of enough rows: the smaller of the two.
      if (!found || (chunk >= kGoodChunk && bytes.peak() < best_bytes.peak())) {
        best = trial;
        best_bytes = bytes;
      }
      found = true;
      if (chunk < rows) break;
    }
    if (!found) return false;
    d = best;
    settle(d, way_, best_bytes);
    return true;
  }

  // g of a chunk has a place of its own: a few slabs of logits.
  void set_chunk_slab(CudaDecision& d) const {
    Sizes& s = d.sizes;
    const std::int64_t numbers = step_.logit_bytes / size_of(d.stat) / s.chunk_rows;
    const std::int64_t count = std::min(kChunkSlab, numbers) / s.slab;
    s.gradient_slab =
        even_piece(classes_of(d.problem).count, std::max<std::int64_t>(count, 1) * s.slab, s.slab);
  }

  // Gradients of all rows, a slab of columns at a time, or none.
  bool find_slab(CudaDecision& d, std::size_t room) const {
    CudaDecision trial = d;
    Sizes& s = trial.sizes;
    const bool none = way_.schedule == Schedule::none;
    s.gradient_rows = none ? s.block_rows
                      : step_.gradient_rows == 0
                          ? s.chunk_rows
                          : even_piece(s.chunk_rows, step_.gradient_rows, 128);
    const std::vector<std::int64_t> widths =
        none ? std::vector<std::int64_t>{s.slab} : slabs(trial, step_);
    for (const std::int64_t slab : widths) {
      s.gradient_slab = slab;
      set_places(trial, way_);
      const Bytes bytes = try_bytes(trial, room);
      if (bytes.peak() > budget_) continue;
      d = trial;
      settle(d, way_, bytes);
      return true;
    }
    return false;
  }

  // room: which of the decision's rooms.
  Bytes try_bytes(const CudaDecision& trial, std::size_t room) const {
    const Bytes bytes = bytes_of(trial, way_, rooms(trial)[room], step_.library_bytes);
    least_ = std::min(least_, bytes.peak());
    return bytes;
  }

  const Way way_;
  const Step& step_;
  const std::int64_t budget_;
  std::int64_t& least_;
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
  const bool quick = device.memory_rate >= kQuickMemory;
  for (const Step& step : kSteps) {
    if (step.logit_bytes > kL2Block && !quick) continue;
    auto d = std::make_shared<CudaDecision>(facts);
    if (Search(way, step, budget, least).find(*d)) return d;
  }
  return nullptr;
}

}  // namespace cutloss::cuda::library
