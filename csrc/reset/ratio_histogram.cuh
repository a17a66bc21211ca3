// One block per chunk: a histogram in shared memory, then its few full bins to the result.
#pragma once

#include "common/tensor_list.cuh"
#include "reset/ratio.h"
#include "reset/ratio_histogram.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

constexpr int kHistogramUnroll = 8;  // ratios in flight per thread, as in threshold_reset.cuh
static_assert(kListChunk % (kListThreads * kHistogramUnroll) == 0);

template <typename Importance>
__device__ __forceinline__ void count_chunk(const RatioHistogramParams& params,
                                            const ListChunk& chunk, int32_t row, unsigned* counts) {
  using Acc = Accumulator<Importance>;
  const ListEntry<kHistogramPointers>& entry = params.list.entries[chunk.entry];
  const auto* forget = static_cast<const Importance*>(entry.pointers[kHistogramForget]);
  const auto* retain = static_cast<const Importance*>(entry.pointers[kHistogramRetain]);
  const auto eps = static_cast<Acc>(params.eps[params.list.tensor[chunk.entry]]);
  const RatioDigit digit(params.level);
  const int32_t prefix = params.level == 0 ? 0 : params.prefix[row];
  for (int64_t first = chunk.begin + threadIdx.x; first < chunk.end;
       first += kListThreads * kHistogramUnroll) {
    float ratio[kHistogramUnroll];
#pragma unroll
    for (int u = 0; u < kHistogramUnroll; ++u) {
      const int64_t i = first + kListThreads * u;
      ratio[u] = i < chunk.end ? importance_ratio<Acc>(widen(forget[i]), widen(retain[i]), eps)
                               : __builtin_nanf("");
    }
#pragma unroll
    for (int u = 0; u < kHistogramUnroll; ++u) {
      if (!(ratio[u] >= 0.0f)) continue;                     // dead or not a number
      const int32_t bits = __float_as_int(fabsf(ratio[u]));  // -0 is 0
      if (digit.matches(bits, prefix)) atomicAdd(counts + digit.digit(bits), 1u);
    }
  }
}

__global__ void __launch_bounds__(kListThreads)
    ratio_histogram_kernel(const __grid_constant__ RatioHistogramParams params) {
  __shared__ unsigned counts[kRatioBins];
  for (int bin = threadIdx.x; bin < kRatioBins; bin += kListThreads) counts[bin] = 0;
  __syncthreads();
  const ListChunk chunk = find_chunk(params.list);
  const int32_t row = params.per_tensor ? params.list.tensor[chunk.entry] : 0;
  const ElementType importance = params.list.entries[chunk.entry].importance;
  if (importance == kDouble) {
    count_chunk<double>(params, chunk, row, counts);
  } else if (importance == kBFloat16) {
    count_chunk<__nv_bfloat16>(params, chunk, row, counts);
  } else {
    count_chunk<float>(params, chunk, row, counts);
  }
  __syncthreads();
  auto* total = reinterpret_cast<unsigned long long*>(params.counts) + int64_t{row} * kRatioBins;
  // Integers add up to the same total in any order.
  for (int bin = threadIdx.x; bin < kRatioBins; bin += kListThreads) {
    if (counts[bin] != 0) atomicAdd(total + bin, static_cast<unsigned long long>(counts[bin]));
  }
}

}  // namespace
}  // namespace fastunlearn
