// The memory of a call of the fused engine; see cuda/layout.h.
#pragma once

#include <vector>

#include "cuda/layout.h"
#include "cuda/sm90/sm90.h"

namespace cutloss::sm90 {

// What the fused engine's plans have beside their sizes; found again from a plan's bytes.
struct Shape {
  std::int64_t c_columns = 0;       // of C, converted at a time; V: once for the call
  bool packs_e_in_forward = false;  // else rows of E are read where they lie
};

// Whether a problem may go by rows here; the reason in words where not.
std::string rows_refusal(const Problem& problem);

// E is evenly spaced rows in the products' dtype: kernels find a row by its position.
bool finds_e_by_position(const Problem& problem, const cuda::Traits& traits);

Grid statistics_grid(const Plan& plan);  // of forward's statistics
Grid logits_grid(std::int64_t rows);     // of kernels that store

std::vector<cuda::Need> workspace_needs(const Plan& plan, const cuda::Traits& traits, Passes passes,
                                        Shape shape);
std::vector<cuda::Need> kept_needs(const Plan& plan);

// The shapes that a plan may have, the quickest first.
std::vector<Shape> shapes(const Plan& plan, const cuda::Traits& traits, Passes passes);
// The first that fits the pass's bytes in the plan.
cuda::Layout workspace_layout(const Plan& plan, const cuda::Traits& traits, Passes passes,
                              Shape* shape);

namespace use {
inline constexpr std::string_view kPartials = "partials";
inline constexpr std::string_view kPartialsMore = "partials_more";
inline constexpr std::string_view kPartialsArgmax = "partials_argmax";
inline constexpr std::string_view kTargetLogit = "target_logit";
inline constexpr std::string_view kReference = "reference";
inline constexpr std::string_view kRedo = "redo";
inline constexpr std::string_view kSums = "sums";  // of exponentials
inline constexpr std::string_view kFactor = "factor";
inline constexpr std::string_view kTargetG = "target_g";
inline constexpr std::string_view kTargetOrder = "target_order";
inline constexpr std::string_view kTargetSort = "target_sort";
inline constexpr std::string_view kTargetSums = "target_sums";
inline constexpr std::string_view kSumOfColumn = "sum_of_column";
inline constexpr std::string_view kScaledE = "scaled_e";
inline constexpr std::string_view kX = "x";
}  // namespace use

}  // namespace cutloss::sm90
