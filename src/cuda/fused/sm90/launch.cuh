// Launches of product_kernel.
#pragma once

#include "cuda/device.h"
#include "cuda/fused/kernels.h"
#include "cuda/fused/sm90/product.cuh"
#include "cuda/fused/sm90/tensor_map.h"

namespace cutloss::cuda::fused::sm90 {

template <int kBytes, class Kernel, class... Arguments>
void launch_blocks(Kernel* kernel, int blocks, cudaStream_t stream, const Arguments&... arguments) {
  static_assert(kBytes <= kMostSharedBytes);
  // This is a property of the kernel on the current device. Setting it again costs a microsecond.
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
              "the Hopper kernel's shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = kCluster;
  attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  config.attrs = attribute;
  config.numAttrs = 1;
  cuda::check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of the Hopper kernel");
}

template <class Config, class Epilogue>
void launch_product(const CUtensorMap& a, const CUtensorMap& b, const CUtensorMap& out,
                    const typename Config::MapOfRow& row_of_b, const ProductParams& params,
                    const typename Epilogue::Params& epilogue, int blocks, cudaStream_t stream) {
  launch_blocks<kSharedBytes<Config, Epilogue>>(product_kernel<Config, Epilogue>, blocks, stream, a,
                                                b, out, row_of_b, params, epilogue);
}

// Launches the product of a block of logits: E times C, with a contiguous depth in both.
template <class Config, class Epilogue>
void launch_logits(const Logits& l, const CUtensorMap* out,
                   const typename Epilogue::Params& epilogue, const Grid& grid,
                   cudaStream_t stream) {
  constexpr bool kSharesColumns = Config::kShare == Share::columns;
  ProductParams params{};
  params.rows = l.rows;
  params.columns = l.columns;
  params.depth = l.depth;
  params.width = grid.width;
  params.count = l.count;
  params.first = l.first;
  params.largest_group = grid.largest_group;
  params.only_if = l.only_if;
  params.positions = l.positions;
  params.a = l.e.data;
  params.a_stride = l.e.stride;
  const CUtensorMap c = tensor_map(l.c.data, l.type, l.columns, l.depth, l.c.stride,
                                   kSharesColumns ? kTileColumns / 2 : grid.width, kTileDepth);
  const CUtensorMap e =
      Config::kGather
          ? c
          : tensor_map(l.e.data, l.type, l.positions == nullptr ? l.rows : l.e_rows, l.depth,
                       l.e.stride, kSharesColumns ? kTileRows : kTileRows / 2, kTileDepth);
  launch_product<Config, Epilogue>(e, c, out == nullptr ? c : *out, {}, params, epilogue,
                                   grid.blocks, stream);
}

template <class Element, Share kShare = Share::columns, bool kGather = false>
using LogitsConfig =
    Config<Element, Major::K, Major::K, kShare, kGather ? Gather::a : Gather::nothing>;

}  // namespace cutloss::cuda::fused::sm90
