// The list of the rows that count, and what is known of each row.
#pragma once

#include <cstdint>

#include "core/row_map.h"
#include "core/row_outputs.h"
#include "cpu/call.h"

namespace cutloss::cpu {

// T is the stat dtype.
template <class T>
class ListedRows {
 public:
  explicit ListedRows(const Call& call);

  // Checks targets and temperatures, and lists the rows that are not ignored.
  void list();
  // Writes zeros to the per-row outputs of ignored rows.
  void clear_ignored() const;

  std::int64_t count() const { return list_[0]; }
  // How many entries the loops must cover.
  std::int64_t to_cover() const { return count(); }
  // The index of entry i of the list into the per-row arrays.
  std::int64_t row(std::int64_t i) const { return list_[1 + i]; }
  RowList entries(RowRange range) const { return {list_ + 1 + range.begin, range.count}; }

  std::int64_t target(std::int64_t n) const;
  // The target of row n as a column of the classes. A target of another shard lies outside of them.
  std::int64_t column(std::int64_t n) const { return target(n) - call_.head.classes.first; }
  // The position of row n among the rows of E.
  std::int64_t position(std::int64_t n) const { return map_.position(n); }
  // How many elements row n of the loss lies behind the first element of E.
  std::int64_t e_offset(std::int64_t n) const;
  T inv_temperature(std::int64_t n) const;

  RowOutputs wanted_outputs() const {
    return cutloss::wanted_outputs(call_.p.wanted, call_.args.rows);
  }

 private:
  void check(std::int64_t n, std::int64_t target) const;

  const Call& call_;
  const RowMap<std::int64_t> map_;
  std::int64_t* const list_;
};

extern template class ListedRows<float>;
extern template class ListedRows<double>;

}  // namespace cutloss::cpu
