// One block per chunk of one tensor; a warp reads 32 neighbours and its ballot is their mask word.
#pragma once

#include <cuda_runtime.h>

#include "reset/threshold_reset.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

struct ListChunk {
  int entry;
  int64_t begin, end;  // elements of that entry
};

template <int kPointers>
__device__ __forceinline__ ListChunk find_chunk(const TensorList<kPointers>& list) {
  const int64_t block = blockIdx.x;
  int low = 0, high = list.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list.first_block[middle] <= block ? low : high) = middle;
  }
  const int64_t begin = (block - list.first_block[low]) * kListChunk;
  const int64_t size = list.entries[low].size;
  return {low, begin, begin + kListChunk < size ? begin + kListChunk : size};
}

// All-zero bits are +0 in every floating-point type, so only the width matters.
__device__ __forceinline__ void write_zero(void* data, int32_t element_bytes, int64_t i) {
  if (element_bytes == 4) {
    static_cast<uint32_t*>(data)[i] = 0;
  } else if (element_bytes == 2) {
    static_cast<uint16_t*>(data)[i] = 0;
  } else {
    static_cast<uint64_t*>(data)[i] = 0;
  }
}

// The product is rounded once, and not fused with anything: the same decision on every back end.
__device__ __forceinline__ bool passes(const void* forget, const void* retain, int32_t wide,
                                       double gamma, int64_t i) {
  if (wide) {
    return static_cast<const double*>(forget)[i] > gamma * static_cast<const double*>(retain)[i];
  }
  return static_cast<const float*>(forget)[i] >
         static_cast<float>(gamma) * static_cast<const float*>(retain)[i];
}

__global__ void __launch_bounds__(kListThreads)
    threshold_reset_kernel(ThresholdResetParams params) {
  __shared__ int64_t warp_counts[kListThreads / 32];
  const ListChunk chunk = find_chunk(params.list);
  const ListEntry<kThresholdPointers>& entry = params.list.entries[chunk.entry];
  auto* mask = static_cast<uint32_t*>(entry.pointers[kResetMask]);
  const int lane = threadIdx.x % 32;

  int64_t count = 0;  // of the whole warp, the same in every lane
  for (int64_t first = chunk.begin + threadIdx.x - lane; first < chunk.end; first += kListThreads) {
    const int64_t i = first + lane;
    const bool reset = i < chunk.end && passes(entry.pointers[kForget], entry.pointers[kRetain],
                                               entry.wide, params.gamma, i);
    const uint32_t word = __ballot_sync(0xffffffffu, reset);
    if (reset) write_zero(entry.pointers[kWeight], entry.element_bytes, i);
    if (lane == 0) mask[first / 32] = word;
    count += __popc(word);
  }
  if (lane == 0) warp_counts[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kListThreads / 32; ++w) count += warp_counts[w];
  // Integers add up to the same total in any order.
  if (count > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.counts +
                                                    params.list.first_tensor[chunk.entry]),
              static_cast<unsigned long long>(count));
  }
}

__global__ void __launch_bounds__(kListThreads) mask_grads_kernel(MaskGradsParams params) {
  const ListChunk chunk = find_chunk(params.list);
  const ListEntry<kMaskPointers>& entry = params.list.entries[chunk.entry];
  const auto* mask = static_cast<const uint32_t*>(entry.pointers[kGradMask]);
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kListThreads) {
    if (!(mask[i / 32] >> (i % 32) & 1)) write_zero(entry.pointers[kGrad], entry.element_bytes, i);
  }
}

}  // namespace
}  // namespace fastunlearn
