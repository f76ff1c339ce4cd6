// The loops of both schedules, over an engine's parts. A chunk is a range of rows whose
// statistics are made together: all rows by vocabulary, plan.chunk_rows of them by rows.
#pragma once

#include "core/engine.h"

namespace cutloss {

// The chunk's rows, cut to the rows that there are.
RowRange rows_of_chunk(const Plan& plan, const Parts& parts, std::int64_t chunk);

void sweep_statistics(const Plan& plan, Parts& parts, RowRange chunk, bool keep);
void sweep_gradients(const Plan& plan, Parts& parts, RowRange chunk, bool from_kept);

}  // namespace cutloss
