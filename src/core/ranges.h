// Ranges of rows and of columns, and the blocks that products are made of.
#pragma once

#include <cstdint>

namespace cutloss {

// A range of the list of rows that count; ignored rows are not in it.
struct RowRange {
  std::int64_t begin = 0;
  std::int64_t count = 0;

  bool operator==(const RowRange&) const = default;
};

// A range of the vocabulary's columns.
struct Columns {
  std::int64_t begin = 0;
  std::int64_t count = 0;

  bool operator==(const Columns&) const = default;
};

// What one product takes: some rows of a chunk, and some columns of the vocabulary.
struct Block {
  RowRange chunk;
  RowRange rows;
  Columns columns;
};

}  // namespace cutloss
