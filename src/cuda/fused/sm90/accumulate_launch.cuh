// The operands of dC's and dE's products, as their kernels take them.
#pragma once

#include "cuda/fused/sm90/epilogues/accumulate.cuh"
#include "cuda/fused/sm90/launch.cuh"

namespace cutloss::cuda::fused::sm90 {

template <Gather kGather>
using DcConfig = Config<cute::bfloat16_t, Major::MN, Major::MN, Share::columns, kGather>;
using DeConfig = Config<cute::bfloat16_t, Major::K, Major::MN, Share::columns>;

struct Accumulated {
  CUtensorMap a, b, out;
  ProductParams params;
  AccumulateParams epilogue;
};

inline CUtensorMap rows_of_e(const DcProduct& s, int rows) {
  const std::int64_t all = s.positions == nullptr ? s.rows : s.e_rows;
  return tensor_map(s.e.data, DType::bf16, all, s.D, s.e.stride, rows, 64);
}

inline Accumulated operands_of(const DcProduct& s) {
  // The rows of the list are the product's depth. Columns (D) come fastest, since going down the
  // vocabulary first would read g again for each tile of D.
  ProductParams params{};
  params.rows = s.V;
  params.columns = s.D;
  params.width = kTileColumns;
  params.depth = s.rows;
  params.count = s.count;
  params.first = s.first;
  params.count_is_depth = true;
  params.largest_group = 1;
  params.positions = s.positions;
  return {tensor_map(s.g.data, DType::bf16, s.rows, s.V, s.g.stride, kTileDepth, 64),
          rows_of_e(s, kTileDepth / 2),
          tensor_map(s.dc, s.dc_type, s.V, s.D, s.D, 16, s.dc_type == DType::f32 ? 32 : 64), params,
          AccumulateParams{s.add, s.scale, s.sum_of_column, s.sums, s.D}};
}

// Where a slab is narrow, reading and writing the sums takes as long as multiplying. Here one group
// of threads does it while the other multiplies, and the addition happens in L2.
inline Accumulated operands_of(const DeProduct& s) {
  ProductParams params{};
  params.rows = s.rows;
  params.columns = s.D;
  params.width = kTileColumns;
  params.depth = s.columns;
  params.count = s.count;
  params.first = s.first;
  params.largest_group = 1;
  return {tensor_map(s.g.data, DType::bf16, s.rows, s.columns, s.g.stride, kTileRows, kTileDepth),
          tensor_map(s.c.data, DType::bf16, s.columns, s.D, s.c.stride, kTileDepth / 2, 64),
          tensor_map(s.sums, DType::f32, s.rows, s.D, s.D, 16, 32), params,
          AccumulateParams{s.add, s.scale, nullptr, nullptr, 0}};
}

}  // namespace cutloss::cuda::fused::sm90
