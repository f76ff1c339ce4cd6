#include "cuda/fused/decision.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.h"
#include "core/logit_math.h"
#include "core/text.h"
#include "cuda/cublaslt.h"
#include "cuda/fused/targets.h"
#include "cuda/fused/tuning.h"
#include "cuda/gradient_sums.h"
#include "plan/chunking.h"

namespace cutloss::cuda::fused {
namespace {

std::int64_t column_tiles(const FusedDecision& d) {
  return divide_up(classes_of(d.problem).count, d.kernels->tile_columns);
}

// What a pass may do otherwise where memory is short.
struct Shape {
  std::int64_t c_columns = 0;  // of C, converted at a time; V: once for the call
  bool packs_e_in_forward = false;
};

bool makes_statistics_by_slabs(Way way, Pass pass) {
  return makes_statistics(pass) && way.schedule != Schedule::rows;
}

// E is evenly spaced rows in the products' dtype: kernels find a row by its position.
bool finds_e_by_position(const CudaDecision& d) {
  const Head& head = head_of(d.problem);
  const Rows& rows = d.problem.rows;
  return head.e_type == d.operand &&
         (rows.sequences == 1 || head.e_sequence_stride == rows.length * head.e_row_stride);
}

// The shapes that a pass may have, the quickest first. Packed rows are read a little quicker than
// gathered ones; with no gradient wanted, memory counts more.
std::vector<Shape> shapes(const FusedDecision& d, Way way, Pass pass) {
  const bool by_rows = way.schedule == Schedule::rows;
  const bool statistics = makes_statistics_by_slabs(way, pass);
  std::vector<bool> packing = {false};
  if (statistics && !finds_e_by_position(d)) {
    packing = {true};
  } else if (statistics && way.schedule != Schedule::none) {
    packing = {true, false};
  }
  const std::int64_t V = classes_of(d.problem).count, slab = d.sizes.slab;
  std::vector<std::int64_t> columns = {V};
  if (d.converts_c && !by_rows) {
    for (const std::int64_t some : {kSomeColumns[0], kSomeColumns[1], slab}) {
      if (some < columns.back() && some >= std::min(slab, V)) columns.push_back(some);
    }
  }
  std::vector<Shape> list;
  for (const bool packs : packing) {
    for (const std::int64_t c_columns : columns) list.push_back({c_columns, packs});
  }
  return list;
}

Reads reads_of(const FusedDecision& d, Way way, Pass pass, const Shape& shape) {
  Reads reads;
  reads.e_in_place = reads_e_in_place(d, way, pass);
  reads.e_in_de = packs_e_in_de(d, way, pass);
  reads.c_columns = shape.c_columns;
  return reads;  // the list is compact: kernels find rows by their positions
}

// Forward's statistics, a slab of columns at a time.
void book_statistics(Ledger& ledger, const FusedDecision& d) {
  const Problem& p = d.problem;
  const Sizes& s = d.sizes;
  const std::int64_t entries = partial_entries(d.statistics_grid, static_cast<int>(s.block_rows));
  ledger.book(buffer::kPartials, entries * 8);
  if (p.wanted.entropy || p.wanted.zbar || p.wanted.argmax) {
    ledger.book(buffer::kPartialsMore, entries * 8);
    ledger.book(buffer::kPartialsArgmax, entries * 8);
  }
  ledger.book(buffer::kTargetLogit, s.chunk_rows * 4);
  if (d.several_slabs) {
    ledger.book(buffer::kStates, s.chunk_rows * std::int64_t{sizeof(RowState<float>)});
  }
}

// A chunk's exponentials, but for what is kept of them.
void book_exponentials(Ledger& ledger, const FusedDecision& d, Way way, Pass pass) {
  const Problem& p = d.problem;
  const std::int64_t rows = d.sizes.chunk_rows;
  const std::int64_t sums = rows * column_tiles(d) * 8;
  const std::int64_t de = rows * head_of(p).D * 4;
  ledger.book(buffer::kRedo, 4);
  if (!way.keeps_logits) {
    ledger.book(buffer::kTargetLogit, rows * 4, Lifetime::seam);
    ledger.book(buffer::kReference, rows * 4, Lifetime::seam);
  }
  // The sums of a chunk are read before its dE begins: there they lie where there is room.
  if (!makes_gradients(pass) || !p.wanted.de.wanted || sums > de) ledger.book(buffer::kSums, sums);
}

// Gradients from exponentials.
void book_by_rows(Ledger& ledger, const FusedDecision& d) {
  const Problem& p = d.problem;
  const Head& head = head_of(p);
  const std::int64_t rows = d.sizes.chunk_rows, V = head.classes.count;
  ledger.book(buffer::kFactor, rows * 4);
  ledger.book(buffer::kTargetG, rows * 4);
  if (p.wanted.dc.wanted || p.wanted.dbias.wanted) {
    ledger.book(buffer::kTargetOrder, rows * 4 * 4);
    ledger.book(buffer::kTargetSort, target_sort_bytes(static_cast<int>(rows)));
  }
  if (p.wanted.dc.wanted) {
    ledger.book(buffer::kScaledE, rows * e_stride(p, d.operand) * size_of(d.operand));
    ledger.book(buffer::kSumOfColumn, V * 4);
    // Else they lie where dE's sums will be.
    if (!p.wanted.de.wanted) ledger.book(buffer::kTargetSums, rows * head.D * 4);
  }
}

// Gradients from logits that are made once more.
void book_by_vocabulary(Ledger& ledger, const FusedDecision& d, const Reads& reads) {
  const Sizes& s = d.sizes;
  if (d.operand == DType::f16) ledger.book(buffer::kScalars, sizeof(DeviceScalars));
  ledger.book(buffer::kCoefficients, s.chunk_rows * std::int64_t{sizeof(RowGradient<float>)});
  book_g(ledger, d, reads);
}

// By rows the library makes dE alone, which comes before dC: until dC is written, its memory lies
// in dC's. Where several chunks add up in dC itself, or E lies in dE, it does not.
bool library_lies_in_dc(const FusedDecision& d, Way way, Pass pass, std::int64_t library_bytes) {
  const Problem& p = d.problem;
  const Wanted& wanted = p.wanted;
  if (way.schedule != Schedule::rows || !makes_gradients(pass) || !wanted.de.wanted) return false;
  if (!wanted.dc.wanted || wanted.dc.add || packs_e_in_de(d, way, pass)) return false;
  if (!d.one_chunk && d.dc_in_place) return false;
  const Head& head = head_of(p);
  return head.classes.count * head.D * size_of(d.dc_type) >= library_bytes + kAlign;
}

// What lies in memory that another buffer will need later.
void book_shares(Ledger& ledger, const FusedDecision& d, Way way, Pass pass) {
  const Problem& p = d.problem;
  if (way.schedule != Schedule::rows || !p.wanted.de.wanted || !makes_gradients(pass)) return;
  const std::int64_t rows = d.sizes.chunk_rows, de = rows * head_of(p).D * 4;
  const std::int64_t sums = rows * column_tiles(d) * 8;
  if (makes_statistics(pass) && sums <= de) {
    ledger.share(buffer::kSums, sums, buffer::kDeSums, "dE's product");
  }
  // dE has been stored when the targets are summed.
  if (p.wanted.dc.wanted) {
    ledger.share(buffer::kTargetSums, de, buffer::kDeSums, "the next chunk");
  }
}

// All but the matrix library's own.
Ledger workspace(const FusedDecision& d, Way way, Pass pass, const Shape& shape) {
  const Problem& p = d.problem;
  const std::int64_t V = classes_of(p).count;
  const std::int64_t e_bytes = e_stride(p, d.operand) * size_of(d.operand);
  const bool by_rows = way.schedule == Schedule::rows;
  const Reads reads = reads_of(d, way, pass, shape);
  Ledger ledger(kAlign);
  book_rows(ledger, d);
  if (d.converts_bias) ledger.book(buffer::kBias, V * 4, Lifetime::call);
  if (d.converts_c) {
    ledger.book(buffer::kC, shape.c_columns * e_bytes,
                shape.c_columns >= V ? Lifetime::call : Lifetime::step);
  }
  const bool packs_e = makes_statistics_by_slabs(way, pass) ? shape.packs_e_in_forward
                                                            : !reads.e_in_place && !reads.e_in_de;
  if (packs_e) {
    ledger.book(buffer::kE, d.sizes.chunk_rows * e_bytes,
                pass == Pass::both ? Lifetime::seam : Lifetime::step);
  }
  if (makes_gradients(pass) && reads.e_in_de) {
    ledger.share(buffer::kE, d.sizes.chunk_rows * head_of(p).D * size_of(d.operand), "dE",
                 "dE is written");
  }
  if (makes_statistics_by_slabs(way, pass)) book_statistics(ledger, d);
  if (makes_statistics(pass) && by_rows) book_exponentials(ledger, d, way, pass);
  if (!makes_gradients(pass)) return ledger;
  by_rows ? book_by_rows(ledger, d) : book_by_vocabulary(ledger, d, reads);
  book_sums(ledger, d, /*always_de_sums=*/by_rows);
  book_shares(ledger, d, way, pass);
  return ledger;
}

Ledger kept(const FusedDecision& d, Way way) {
  Ledger ledger(kAlign);
  if (way.schedule != Schedule::rows) return ledger;
  const Lifetime life = way.keeps_logits ? Lifetime::kept : Lifetime::seam;
  const std::int64_t rows = d.sizes.chunk_rows;
  ledger.book(buffer::kX,
              rows * padded(classes_of(d.problem).count, DType::bf16) * size_of(DType::bf16), life);
  if (way.keeps_logits) {
    ledger.book(buffer::kTargetLogit, rows * 4, life);
    ledger.book(buffer::kReference, rows * 4, life);
  }
  return ledger;
}

// A pass in its first shape whose bytes, with the matrix library's, are within `budget`, or else in
// the last; then in the roomiest shape that those bytes hold, the rest being the library's.
Ledger settle(FusedDecision& d, Way way, Pass pass, std::int64_t library_bytes,
              std::int64_t budget) {
  const std::vector<Shape> all = shapes(d, way, pass);
  const bool in_dc = library_lies_in_dc(d, way, pass, library_bytes);
  std::int64_t bytes = 0;
  for (const Shape& shape : all) {
    bytes = workspace(d, way, pass, shape).bytes() + (in_dc ? 0 : library_bytes);
    if (bytes <= budget) break;
  }
  for (const Shape& shape : all) {
    Ledger ledger = workspace(d, way, pass, shape);
    if (ledger.bytes() > bytes) continue;
    if (in_dc) {
      ledger.share(buffer::kLibrary, library_bytes + kAlign, "dC", "dC is written");
    } else {
      ledger.book(buffer::kLibrary, bytes - ledger.bytes());
    }
    Reads& reads = pass == Pass::backward ? d.backward_reads : d.forward_reads;
    reads = reads_of(d, way, pass, shape);
    if (makes_statistics(pass)) d.packs_e_in_forward = shape.packs_e_in_forward;
    return ledger;
  }
  throw Error(ErrorCode::internal, text("a pass does not fit into its own ", bytes, " bytes"));
}

// Books the memory of a decision whose sizes are set.
void book(FusedDecision& d, Way way, std::int64_t library_bytes, std::int64_t budget) {
  const Sizes& s = d.sizes;
  set_places(d, way);
  set_last(d, way);
  set_places(d, way);
  d.several_slabs = s.slab < classes_of(d.problem).count;
  d.statistics_grid = d.kernels->grid(d.multiprocessors, static_cast<int>(s.block_rows),
                                      static_cast<int>(s.slab), /*may_share_rows=*/true);
  d.kept = kept(d, way);
  const std::int64_t left = budget - d.kept.bytes();
  const Pass first = first_pass(way);
  d.forward = settle(d, way, first, makes_gradients(first) ? library_bytes : 0, left);
  d.backward = has_backward(way) ? settle(d, way, Pass::backward, library_bytes, left) : Ledger();
}

// Columns of a slab that need not be the whole vocabulary: C is converted a slab at a time.
std::int64_t forward_slab(const FusedDecision& d, bool small) {
  const std::int64_t V = classes_of(d.problem).count;
  if (!d.converts_c) return V;
  return std::min(V, small ? kSmallForwardSlab : kForwardSlab);
}

// One size of the matrix library's memory, within a budget.
class Search {
 public:
  Search(const FusedDecision& facts, Way way, const LibraryMemory& library, std::int64_t budget,
         std::int64_t& least)
      : facts_(facts),
        way_(way),
        library_(library),
        budget_(budget),
        least_(least),
        rows_(std::max<std::int64_t>(row_count(facts.problem), 1)),
        V_(classes_of(facts.problem).count),
        tile_(facts.kernels->tile_columns) {}

  // Null where nothing fits.
  std::shared_ptr<const FusedDecision> find() const {
    FusedDecision found = way_.schedule == Schedule::rows ? by_rows() : by_slabs();
    if (peak_bytes(found) > budget_) return nullptr;
    found.predicted_time = predicted_time(found);
    return std::make_shared<FusedDecision>(std::move(found));
  }

 private:
  FusedDecision by_rows() const {
    const auto of = [&](std::int64_t most) {
      const std::int64_t chunk = even_piece(rows_, most, kBlockRows);
      return attempt({chunk, chunk, V_, chunk, V_}, V_);
    };
    FusedDecision whole = of(rows_);
    const Problem& p = facts_.problem;
    const bool asked_for = p.schedule == Schedule::rows || !p.wanted.dc.wanted;
    const std::int64_t least = asked_for ? kBlockRows : kLeastChunk;
    if (way_.keeps_logits || rows_ <= least) return whole;
    const std::int64_t chunk =
        largest_that_fits(least, kMostChunk, kBlockRows, budget_,
                          [&](std::int64_t most) { return peak_bytes(of(most)); });
    if (chunk == 0) return whole;
    FusedDecision parts = of(chunk);
    // The whole in one chunk, or chunks of enough rows: the smaller of the two.
    const bool smaller = chunk >= kGoodChunk && peak_bytes(parts) < peak_bytes(whole);
    return peak_bytes(whole) > budget_ || smaller ? std::move(parts) : std::move(whole);
  }

  FusedDecision by_slabs() const {
    FusedDecision found;
    for (const bool small : {false, true}) {
      found = by_slabs(forward_slab(facts_, small));
      if (peak_bytes(found) <= budget_) break;
    }
    return found;
  }

  // Gradients a slab of columns at a time, the widest that fits.
  FusedDecision by_slabs(std::int64_t slab) const {
    if (way_.schedule == Schedule::none) return attempt({rows_, rows_, slab, rows_, slab}, V_);
    const auto of = [&](std::int64_t most_rows, std::int64_t wide, std::int64_t last_begin) {
      const std::int64_t chunk = even_piece(rows_, most_rows, kBlockRows);
      return attempt({chunk, chunk, slab, chunk, std::min(wide, V_)}, last_begin);
    };
    const auto widest = [&](std::int64_t most_rows, std::int64_t last_begin) {
      const std::int64_t wide = largest_that_fits(
          kLeastSlab, std::max(kLeastSlab, round_up(std::min(V_, kMostSlab), kSlabUnit)), kSlabUnit,
          budget_, [&](std::int64_t size) { return peak_bytes(of(most_rows, size, last_begin)); });
      FusedDecision d = of(most_rows, std::max(wide, kLeastSlab), last_begin);
      return of(most_rows, quickest_slab(d), last_begin);
    };
    return with_sums_placed(
        facts_, {budget_, facts_.de_in_place, tile_, kLeastChunk, kBlockRows}, widest,
        [&](std::int64_t rows) { return peak_bytes(of(rows, kLeastSlab, V_)); },
        [](const FusedDecision& d) { return peak_bytes(d); },
        [&](const FusedDecision& d) { return predicted_time(d); });
  }

  // Notes the least that was tried.
  FusedDecision attempt(const Sizes& sizes, std::int64_t last_begin) const {
    FusedDecision trial = facts_;
    trial.sizes = sizes;
    trial.last.begin = last_begin;
    trial.makes_de_itself = with_own_de(trial) < with_library_de(trial);
    book(trial, way_, library_.bytes, budget_);
    least_ = std::min(least_, peak_bytes(trial));
    return trial;
  }

  // A slab at most as wide as the decision's whose tiles leave few multiprocessors idle.
  std::int64_t quickest_slab(const FusedDecision& d) const {
    const std::int64_t most = d.sizes.gradient_slab;
    std::int64_t best = most;
    FusedDecision trial = d;
    double best_time = predicted_time(d);
    for (std::int64_t slab = most / kSlabUnit * kSlabUnit; slab >= kLeastSlab && 3 * slab >= most;
         slab -= kSlabUnit) {
      trial.sizes.gradient_slab = slab;
      const double time = predicted_time(trial);
      if (time < best_time) {
        best = slab;
        best_time = time;
      }
    }
    return best;
  }

  // The time of a product of (rows, columns) in tiles, in that of one whose tiles leave no
  // multiprocessor idle: clusters of two take a tile each at a time.
  double in_tiles(std::int64_t rows, std::int64_t columns) const {
    const std::int64_t clusters = facts_.multiprocessors / 2;
    const std::int64_t tiles = divide_up(rows, kBlockRows) * divide_up(columns, tile_);
    return static_cast<double>(round_up(tiles, clusters) * kBlockRows * tile_) /
           (static_cast<double>(rows) * static_cast<double>(columns));
  }

  // What is idle of a product, in products.
  double idle(std::int64_t rows, std::int64_t columns) const { return in_tiles(rows, columns) - 1; }

  // What dC's and dE's products take beyond their own time: where dE's is ours, if it can be, and
  // where it is the library's.
  double with_own_de(const FusedDecision& d) const {
    const Wanted& wanted = facts_.problem.wanted;
    const bool can =
        d.operand == DType::bf16 && way_.schedule == Schedule::vocabulary && wanted.de.wanted;
    if (!can) return std::numeric_limits<double>::infinity();
    const std::int64_t D = head_of(facts_.problem).D, slab = std::min(d.sizes.gradient_slab, V_);
    return kOwnSlower + passes_over_sums(kOwnFlopsPerByte, divide_up(V_, slab), V_) +
           (wanted.dc.wanted
                ? d.kernels->dc_and_de_time(facts_.multiprocessors, d.sizes.chunk_rows, slab, D) - 2
                : idle(d.sizes.chunk_rows, D));
  }
  double with_library_de(const FusedDecision& d) const {
    const Wanted& wanted = facts_.problem.wanted;
    const std::int64_t slab = d.sizes.gradient_slab;
    double time = 0;
    if (wanted.dc.wanted) time += idle(slab, head_of(facts_.problem).D);
    if (wanted.de.wanted) {
      const std::int64_t slabs = divide_up(V_, slab);
      time += library_.slower + passes_over_sums(kLibraryFlopsPerByte, slabs, V_) + launches(slabs);
    }
    return time;
  }

  double predicted_time(const FusedDecision& d) const {
    const Problem& p = facts_.problem;
    const std::int64_t chunk = d.sizes.chunk_rows, slab = d.sizes.gradient_slab;
    const bool de = p.wanted.de.wanted, dc = p.wanted.dc.wanted;
    double time = products_of(p, way_);
    if (de && way_.schedule == Schedule::rows) time += library_.slower;
    if (dc && !d.one_chunk) time += passes_over_sums(kFlopsPerByte, divide_up(rows_, chunk), rows_);
    if (way_.schedule != Schedule::vocabulary) return time;
    const std::int64_t last = V_ - d.last.begin;
    const double again = static_cast<double>(last) / static_cast<double>(V_);
    time += again + (1 + again) * idle(chunk, slab);
    time += std::min(with_own_de(d), with_library_de(d));
    const std::int64_t slabs = divide_up(d.last.begin, slab) + 2 * divide_up(last, slab);
    return time + launches(2 * slabs * divide_up(rows_, chunk));
  }

  // So many kernels, in products.
  double launches(std::int64_t count) const {
    return static_cast<double>(count) * kFlopsOfLaunch /
           (2.0 * static_cast<double>(rows_) * static_cast<double>(V_) *
            static_cast<double>(head_of(facts_.problem).D));
  }

  const FusedDecision& facts_;
  const Way way_;
  const LibraryMemory& library_;
  const std::int64_t budget_;
  std::int64_t& least_;
  const std::int64_t rows_, V_, tile_;
};

}  // namespace

const LogitKernels* kernels_of(const DeviceFacts& device) {
  return device.sm == 90 ? &sm90::kernels : nullptr;
}

Grid logits_grid(const FusedDecision& d, std::int64_t rows) {
  return d.kernels->grid(d.multiprocessors, static_cast<int>(rows), 0, false);
}

std::string by_rows_refusal(const Problem& p, const DeviceFacts& device) {
  if (product_type(p, device) != DType::bf16) {
    return "kept exponentials need the range of bf16; the products' dtype is f16";
  }
  if (p.wanted.entropy || p.wanted.zbar || p.wanted.argmax || p.upstream.entropy ||
      p.upstream.zbar) {
    return "entropy, zbar and argmax need logits, but by rows exponentials are kept";
  }
  return "";
}

std::shared_ptr<const Decision> decide(const Algorithm& algorithm, const Problem& p,
                                       const DeviceFacts& device, std::int64_t budget,
                                       std::int64_t& least) {
  const Way way = algorithm.way;
  FusedDecision facts;
  facts.kernels = kernels_of(device);
  set_facts(facts, algorithm, p, device);
  facts.finds_last_e = facts.operand == DType::bf16 && finds_e_by_position(facts);
  std::shared_ptr<const FusedDecision> best;
  for (const LibraryMemory& library : kLibraryMemory) {
    auto found = Search(facts, way, library, budget, least).find();
    if (found == nullptr) continue;
    if (best == nullptr || found->predicted_time < best->predicted_time) best = std::move(found);
  }
  return best;
}

}  // namespace cutloss::cuda::fused
