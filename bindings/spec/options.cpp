#include "spec/options.h"

#include <cstdlib>

namespace cutloss::spec {
namespace {

struct Row {
  Takers takers;
  std::string_view type, name, default_value;
};

constexpr Row kRows[] = {
#define OPTION(takers, type, name, default_value, member) \
  {Takers::takers, type, #name, default_value},
#include "spec/options.inc"
#undef OPTION
};

}  // namespace

std::string with_options(Takers operators, std::string_view schema) {
  std::string options;
  for (const auto& [takers, type, name, default_value] : kRows) {
    if (!take(takers, operators)) continue;
    if (!options.empty()) options += ", ";
    options.append(type).append(" ").append(name);
    if (!default_value.empty()) options.append("=").append(default_value);
  }
  constexpr std::string_view kWord = "OPTIONS";
  std::string out(schema);
  return out.replace(out.find(kWord), kWord.size(), options);
}

Problem problem_of(const Options& options, Upstream when) {
  Problem p = options.problem;
  if (std::holds_alternative<Logits>(p.source)) {
    p.wanted.dlogits.wanted = true;
    // For tests and measurements.
    if (const char* blocks = std::getenv("CUTLOSS_BLOCKS_PER_ROW")) {
      logits_of(p).blocks_per_row = std::atoi(blocks);
    }
  } else {
    // A shard's rows are closed elsewhere.
    p.wanted.state = classes_of(p).total != 0;
    const DType sums = p.compute_type == DType::f64 ? DType::f64 : DType::f32;
    if (options.de_in_sums) p.wanted.de.type = sums;
    if (options.dc_adds) {
      p.wanted.dc.type = sums;
      p.wanted.dc.add = true;
    }
    // For tests and measurements: the one engine that a plan may take.
    if (const char* engine = std::getenv("CUTLOSS_ENGINE")) p.engine = engine;
  }
  const bool gradient = wants_gradient(p);
  p.upstream.when = gradient ? when : Upstream::none;
  p.upstream.entropy = gradient && p.wanted.entropy;
  p.upstream.zbar = gradient && p.wanted.zbar;
  return p;
}

}  // namespace cutloss::spec
