// The seam between the schedules (loops, written once) and the engines (parts, one table each).
// An engine plans its tile sizes, and for one call binds its parts to the call's pointers.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "cutloss/cutloss.h"

namespace cutloss {

// Positions in the list of rows that count (ignored rows are not in it).
struct RowRange {
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

struct Columns {
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

// One product's worth: some rows of a chunk, some columns of the vocabulary.
struct Block {
  RowRange chunk;
  RowRange rows;
  Columns columns;
};

// What one call does, in the order in which the schedules call it.
class Parts {
 public:
  virtual ~Parts() = default;

  // Checks what only the data shows (targets, per-row temperatures) before anything is written,
  // and lists the rows that count.
  virtual void list_rows() = 0;
  // How many rows the loops must cover: the rows that count where the host knows, else all.
  virtual std::int64_t rows_to_cover() const = 0;
  virtual RowList list(RowRange rows) const = 0;

  // Forward.
  virtual void begin_statistics(RowRange chunk) = 0;
  virtual void accumulate_statistics(const Block& block, bool keep) = 0;
  virtual void finish_statistics(RowRange chunk) = 0;
  // Zeros in the per-row outputs of ignored rows.
  virtual void clear_ignored_outputs() = 0;

  // Backward. g of a block stays with the parts until the next make_g. The accumulating parts
  // start from nothing at column 0 (dE) and at row 0 of the list (dC, dbias).
  virtual void make_g(const Block& block, bool from_kept) = 0;
  virtual void accumulate_dbias(const Block& block) = 0;
  virtual void accumulate_de(const Block& block) = 0;
  virtual void accumulate_dc(const Block& block) = 0;
  virtual void store_dc(Columns columns) = 0;  // these columns have seen every row
  virtual void store_de(RowRange chunk) = 0;   // these rows have seen every column
  // The rest of the gradients: ignored rows, dbias, everything where no row counts.
  virtual void finish_gradients() = 0;

  // The sum of the rows' outputs times args.upstream (cutloss.h, weighted_loss).
  virtual void sum_loss(void* loss, const bool* undefined) = 0;
};

// The passes of one call: they decide what its workspace holds.
struct Passes {
  bool forward;
  bool backward;
};

class Engine {
 public:
  virtual ~Engine() = default;
  virtual std::string_view name() const = 0;
  virtual std::string description() const = 0;  // libraries, versions, what it found
  // Why the engine cannot do this problem; empty where it can.
  virtual std::string refusal(const Problem& problem) const = 0;
  // Why it cannot go by a schedule that others can; empty where it can.
  virtual std::string schedule_refusal(const Problem&, Schedule) const { return ""; }
  // Fills in sizes and bytes of a plan whose schedule and keeps_logits are set, within `budget`
  // bytes (kept and workspace of the larger pass). False: it does not fit, and `smallest` says
  // how many bytes would do.
  virtual bool fit(Plan& plan, std::int64_t budget, std::int64_t& smallest) const = 0;
  virtual std::unique_ptr<Parts> bind(const Plan& plan, const Args& args, Passes passes) const = 0;
};

// Every engine of this build, in the order in which make_plan asks them.
std::span<const Engine* const> engines();
const Engine& engine_named(std::string_view name);

}  // namespace cutloss
