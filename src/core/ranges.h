// Ranges of rows and of columns, and what one product takes of both.
#pragma once

#include <cstdint>

namespace cutloss {

// Entries of the list of rows that count (ignored rows are not in it).
struct RowRange {
  std::int64_t begin = 0;
  std::int64_t count = 0;

  bool operator==(const RowRange&) const = default;
};

// Columns of the vocabulary.
struct Columns {
  std::int64_t begin = 0;
  std::int64_t count = 0;

  bool operator==(const Columns&) const = default;
};

// One product's worth: some rows of a chunk, some columns of the vocabulary.
struct Block {
  RowRange chunk;
  RowRange rows;
  Columns columns;
};

}  // namespace cutloss
