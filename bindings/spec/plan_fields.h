// A plan as fields, for languages that read JSON.
#pragma once

#include <string>

#include "spec/decide.h"

namespace cutloss::spec {

// An object with the fields of python/cutloss/_core/plan.py, which says what each of them is.
// `problem` is the one that was decided.
std::string plan_fields(const Problem& problem, const Decided& decided);

// A list of objects with most, in_forward and schedule, by decide_for_rows.
std::string fields_for_rows(const Problem& problem);

// A list of the engines of this build: objects with name, absent, description (EngineHere).
std::string engine_fields();

}  // namespace cutloss::spec
