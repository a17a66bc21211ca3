// Sums in a fixed order: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

inline constexpr int kReduceThreads = 256;

// out[i] += partial[0][i] + partial[1][i] + ... in that order.   partial [splits, count]
template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads)
    add_splits_kernel(Acc* out, const Acc* partial, int64_t splits, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= count) return;
  Acc sum = partial[i];
  for (int64_t s = 1; s < splits; ++s) sum += partial[s * count + i];
  out[i] += sum;
}

// The sum over a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace
}  // namespace fastunlearn
