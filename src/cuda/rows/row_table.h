// The list of the rows that count in device memory. list_rows makes it in the workspace, and every
// kernel that works on rows reads it.
#pragma once

#include <cstdint>

namespace cutloss::cuda {

// Entry i is the i-th row that counts. Entries from *count on, as many as there are rows that do
// not count, stand for no row and have row = -1.
struct RowTable {
  int* count = nullptr;             // how many rows count
  int* mismatch = nullptr;          // 1 where Problem::num_valid is given and is not *count
  std::int64_t* row = nullptr;      // n, the index into the per-row arrays
  int* position = nullptr;          // the row of E, counted through all sequences
  int* target = nullptr;            // the target's column, kWrongTarget or kTargetElsewhere
  void* inv_temperature = nullptr;  // in the stat dtype; NaN where the temperature is not usable
};

// What backward needs of an entry's row (RowCoefficients of logit_math.h). All but row_max,
// log_sum, entropy and inv_temperature carry the scale of g.
template <class T>
struct RowGradient {
  T row_max, log_sum, a, target_g;  // target_g is without the transform's slope
  T d_entropy, entropy, zbar, inv_temperature;
};

}  // namespace cutloss::cuda
