// One block per chunk of one tensor; a warp reads 32 neighbours and its ballot is their mask word.
#pragma once

#include "common/tensor_list.cuh"
#include "reset/ratio.h"
#include "reset/threshold_reset.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// Mask words per warp and round: 16 loads of 4 bytes in flight per thread, 128 KB per
// multiprocessor, several times what the latency of its memory covers.
constexpr int kResetWords = 8;
static_assert(kListChunk % (kListThreads * kResetWords) == 0);

// Returns how many weights the calling warp replaced, in every lane.
template <typename Weight, typename Importance>
__device__ __forceinline__ int64_t reset_chunk(const ThresholdResetParams& params,
                                               const ListChunk& chunk) {
  using Acc = Accumulator<Importance>;
  using WeightAcc = Accumulator<Weight>;
  const ListEntry<kThresholdPointers>& entry = params.list.entries[chunk.entry];
  const double* rule = params.rules + kResetRules * params.list.tensor[chunk.entry];
  const auto gamma = static_cast<float>(rule[kGamma]);
  const auto eps = static_cast<Acc>(rule[kEps]);
  const auto* forget = static_cast<const Importance*>(entry.pointers[kForget]);
  const auto* retain = static_cast<const Importance*>(entry.pointers[kRetain]);
  const auto* initial = static_cast<const Weight*>(entry.pointers[kInitial]);
  auto* weight = static_cast<Weight*>(entry.pointers[kWeight]);
  auto* mask = static_cast<uint32_t*>(entry.pointers[kResetMask]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  int64_t count = 0;
  for (int64_t first = chunk.begin + warp * 32 * kResetWords; first < chunk.end;
       first += kListThreads * kResetWords) {
    float ratio[kResetWords];
#pragma unroll
    for (int u = 0; u < kResetWords; ++u) {
      const int64_t i = first + 32 * u + lane;
      ratio[u] = i < chunk.end ? importance_ratio<Acc>(widen(forget[i]), widen(retain[i]), eps)
                               : __builtin_nanf("");
    }
    uint32_t word_of_lane = 0;
#pragma unroll
    for (int u = 0; u < kResetWords; ++u) {
      const bool reset = ratio[u] > gamma;
      const uint32_t word = __ballot_sync(0xffffffffu, reset);
      if (lane == u) word_of_lane = word;
      count += __popc(word);
      if (!reset) continue;
      const int64_t i = first + 32 * u + lane;
      if (params.mode == kFill) {
        weight[i] = narrow<Weight>(static_cast<WeightAcc>(rule[kFillValue]));
      } else if (params.mode == kInit) {
        weight[i] = initial[i];
      } else {
        const WeightAcc factor =
            static_cast<WeightAcc>(params.dampening) / static_cast<WeightAcc>(ratio[u]);
        weight[i] =
            narrow<Weight>(widen(weight[i]) * (factor < WeightAcc(1) ? factor : WeightAcc(1)));
      }
    }
    if (lane < kResetWords && first + 32 * lane < chunk.end) mask[first / 32 + lane] = word_of_lane;
  }
  return count;
}

__global__ void __launch_bounds__(kListThreads)
    threshold_reset_kernel(const __grid_constant__ ThresholdResetParams params) {
  __shared__ int64_t warp_counts[kListThreads / 32];
  const ListChunk chunk = find_chunk(params.list);
  const auto& entry = params.list.entries[chunk.entry];
  int64_t count = 0;
  visit_type(entry.type, [&]<typename Weight>() {
    if (entry.importance == kDouble) {
      count = reset_chunk<Weight, double>(params, chunk);
    } else if (entry.importance == kBFloat16) {
      count = reset_chunk<Weight, __nv_bfloat16>(params, chunk);
    } else {
      count = reset_chunk<Weight, float>(params, chunk);
    }
  });
  if (threadIdx.x % 32 == 0) warp_counts[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kListThreads / 32; ++w) count += warp_counts[w];
  // Integers add up to the same total in any order.
  if (count > 0) {
    atomicAdd(
        reinterpret_cast<unsigned long long*>(params.counts + params.list.tensor[chunk.entry]),
        static_cast<unsigned long long>(count));
  }
}

}  // namespace
}  // namespace fastunlearn
