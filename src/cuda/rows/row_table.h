// The rows that count, as the device knows them: made in the workspace by list_rows, read by every
// kernel that works on rows.
#pragma once

#include <cstdint>

namespace cutloss::cuda {

// Entry i is the i-th row that counts. Entries that stand for no row have row = -1: those from
// *count on, as many as there are rows that do not count.
struct RowTable {
  int* count = nullptr;             // rows that count
  int* mismatch = nullptr;          // 1 where Problem::num_valid is given and is not *count
  std::int64_t* row = nullptr;      // n, into the per-row arrays
  int* position = nullptr;          // the row of E, counting every position of every sequence
  int* target = nullptr;            // its column, kWrongTarget or kTargetElsewhere
  void* inv_temperature = nullptr;  // stat dtype; NaN where the temperature is not usable
};

// What backward needs of a row; a table entry each (logit_math.h, RowCoefficients). All but
// row_max, log_sum, entropy and inv_temperature carry the scale of g.
template <class T>
struct RowGradient {
  T row_max, log_sum, a, target_g;  // target_g: but for the transform's slope
  T d_entropy, entropy, zbar, inv_temperature;
};

}  // namespace cutloss::cuda
