// The list of the rows that count, in device memory.
#pragma once

#include "core/row_outputs.h"
#include "cuda/call.h"
#include "cuda/rows/row_facts.h"

namespace cutloss::cuda {

// T is the stat dtype.
template <class T>
class ListedRows {
 public:
  explicit ListedRows(const Call& call);

  void list() const;
  // Writes zeros to the per-row outputs of ignored rows.
  void clear_ignored() const;

  // How many entries the loops must cover: the rows that count where the host knows them, else all.
  std::int64_t to_cover() const;
  RowList entries(RowRange range) const { return {table_.row + range.begin, range.count}; }

  const RowTable& table() const { return table_; }
  RowFacts facts() const;
  Places places(std::int64_t first) const;
  RowOutputs wanted_outputs() const {
    return cutloss::wanted_outputs(call_.p.wanted, call_.args.rows);
  }

 private:
  const Call& call_;
  const RowTable table_;
};

extern template class ListedRows<float>;
extern template class ListedRows<double>;

}  // namespace cutloss::cuda
