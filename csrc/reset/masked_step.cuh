// One block per chunk of one tensor. A warp takes the 32 words of a start block: each lane counts
// the bits of one, and a scan tells every word where its state begins.
#pragma once

#include "common/tensor_list.cuh"
#include "reset/masked_step.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

template <typename Weight, typename Rule>
__device__ __forceinline__ void step_chunk(const MaskedStepParams<Rule>& params,
                                           const ListChunk& chunk) {
  using Acc = Accumulator<Weight>;
  const ListEntry<kStepPointers>& entry = params.list.entries[chunk.entry];
  auto* weight = static_cast<Weight*>(entry.pointers[kStepWeight]);
  const auto* grad = static_cast<const Weight*>(entry.pointers[kStepGrad]);
  const auto* mask = static_cast<const uint32_t*>(entry.pointers[kStepMask]);
  const auto* starts = static_cast<const int64_t*>(entry.pointers[kStepStarts]);
  auto* first = static_cast<Acc*>(entry.pointers[kStepFirst]);
  auto* second = static_cast<Acc*>(entry.pointers[kStepSecond]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t words = (entry.size + 31) / 32;
  for (int64_t block = chunk.begin / kStartBlock + warp; block * kStartBlock < chunk.end;
       block += kListThreads / 32) {
    const int64_t w = 32 * block + lane;
    const uint32_t mine = w < words ? mask[w] & valid_bits(entry.size - 32 * w) : 0;
    int before = __popc(mine);  // bits in the words up to this lane's
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int lower = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane >= offset) before += lower;
    }
    before -= __popc(mine);
#pragma unroll 2
    for (int u = 0; u < 32; ++u) {
      const uint32_t word = __shfl_sync(0xffffffffu, mine, u);
      const int rank = __shfl_sync(0xffffffffu, before, u) + __popc(word & ((1u << lane) - 1));
      if (!(word >> lane & 1)) continue;
      const int64_t i = block * kStartBlock + 32 * u + lane;
      const int64_t k = starts[block] + rank;
      weight[i] = narrow<Weight>(
          params.rule.template step<Acc>(widen(weight[i]), widen(grad[i]), first + k, second + k));
    }
  }
}

// Three blocks a multiprocessor: left to itself, ptxas spills in the float64 division of AdamW.
template <typename Rule>
__global__ void __launch_bounds__(kListThreads, 3)
    masked_step_kernel(const __grid_constant__ MaskedStepParams<Rule> params) {
  const ListChunk chunk = find_chunk(params.list);
  visit_type(params.list.entries[chunk.entry].type,
             [&]<typename Weight>() { step_chunk<Weight>(params, chunk); });
}

__global__ void __launch_bounds__(kListThreads)
    mask_grads_kernel(const __grid_constant__ MaskGradsParams params) {
  const ListChunk chunk = find_chunk(params.list);
  const ListEntry<kMaskPointers>& entry = params.list.entries[chunk.entry];
  const auto* mask = static_cast<const uint32_t*>(entry.pointers[kGradMask]);
  visit_type(entry.type, [&]<typename Grad>() {
    auto* grad = static_cast<Grad*>(entry.pointers[kGrad]);
    for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kListThreads) {
      if (!(mask[i / 32] >> (i % 32) & 1)) grad[i] = narrow<Grad>(0);
    }
  });
}

}  // namespace
}  // namespace fastunlearn
