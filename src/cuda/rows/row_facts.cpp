#include "cuda/rows/row_facts.h"

#include "core/dtype.h"
#include "core/refuse.h"
#include "core/text.h"
#include "core/validate.h"

namespace cutloss::cuda {

std::string size_refusal(const Rows& rows, std::int64_t V, std::int64_t most_columns) {
  const std::int64_t positions = rows.sequences * rows.length;
  if (positions <= std::numeric_limits<std::int32_t>::max() && V <= most_columns) return "";
  return text("sequences x length = ", positions, " and V = ", V, " must be under 2^31");
}

RowFacts row_facts(const Rows& rows, const Classes& classes, const void* targets) {
  if (const std::string refusal = size_refusal(rows, classes.total); !refusal.empty()) {
    refuse(ErrorCode::unsupported, refusal);
  }
  RowFacts facts;
  facts.targets = targets;
  facts.target_type = rows.target_type;
  facts.ignore_index = rows.ignore_index;
  facts.rows = static_cast<int>(row_count(rows));
  facts.map = row_map<int>(rows);
  facts.V = static_cast<int>(classes.total);
  facts.classes = classes;
  facts.num_valid = rows.num_valid.value_or(-1);
  return facts;
}

RowFacts row_facts(const LossRows& rows, const void* targets) {
  return row_facts(rows.rows, {0, rows.classes, rows.classes}, targets);
}

RowFacts row_facts(const Problem& problem, const void* targets, const void* temperature) {
  RowFacts facts = row_facts(problem.rows, classes_of(problem), targets);
  facts.temperature = problem.rows.has_temperature ? temperature : nullptr;
  facts.temperature_scale = problem.transform.temperature;
  const auto [least, most] = usable_range(stat_type(problem));
  facts.least = least;
  facts.most = most;
  return facts;
}

}  // namespace cutloss::cuda
