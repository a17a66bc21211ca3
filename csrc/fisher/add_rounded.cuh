// One block per chunk of one tensor; a thread takes the eight positions of one Philox counter.
#pragma once

#include "common/tensor_list.cuh"
#include "fisher/add_rounded.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// Two neighbouring sums in one word, the first in its lower half, as memory has them.
__device__ __forceinline__ uint32_t add_pair(uint32_t sums, float first, float second,
                                             uint32_t random) {
  const uint32_t low = round_to_bfloat16(number_of(sums << 16) + first, random & 0xffffu);
  const uint32_t high = round_to_bfloat16(number_of(sums & 0xffff0000u) + second, random >> 16);
  return low | high << 16;
}

__global__ void __launch_bounds__(kListThreads)
    add_rounded_kernel(const __grid_constant__ AddRoundedParams params) {
  const ListChunk chunk = find_chunk(params.list);
  const ListEntry<kAddRoundedPointers>& entry = params.list.entries[chunk.entry];
  auto* sum = static_cast<uint16_t*>(entry.pointers[kRoundedSum]);
  const auto* addend = static_cast<const float*>(entry.pointers[kAddend]);
  const int64_t offset = params.offsets[chunk.entry];
  const int lead = static_cast<int>(offset % kOctet);
  // Element -lead is where an octet begins; a whole octet is a vector where that is on 16 bytes.
  const bool vectors = (reinterpret_cast<uintptr_t>(sum) - 2 * lead) % 16 == 0 &&
                       (reinterpret_cast<uintptr_t>(addend) - 4 * lead) % 16 == 0;
  // The first and the last octet may be shared with the chunks beside this one.
  for (int64_t first = (chunk.begin + lead) / kOctet * kOctet - lead + kOctet * threadIdx.x;
       first < chunk.end; first += kOctet * kListThreads) {
    const PhiloxWords words =
        rounding_words(params.seed, params.step, static_cast<uint64_t>(offset + first) / kOctet);
    if (vectors && first >= chunk.begin && first + kOctet <= chunk.end) {
      auto* at = reinterpret_cast<uint4*>(sum + first);
      const uint4 sums = *at;
      const float4 a = *reinterpret_cast<const float4*>(addend + first);
      const float4 b = *reinterpret_cast<const float4*>(addend + first + 4);
      *at = make_uint4(add_pair(sums.x, a.x, a.y, words.x), add_pair(sums.y, a.z, a.w, words.y),
                       add_pair(sums.z, b.x, b.y, words.z), add_pair(sums.w, b.z, b.w, words.w));
      continue;
    }
    const uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const int64_t i = first + k;
      if (i < chunk.begin || i >= chunk.end) continue;
      const uint32_t random = word[k / 2] >> 16 * (k % 2) & 0xffffu;
      const float exact = number_of(static_cast<uint32_t>(sum[i]) << 16) + addend[i];
      sum[i] = static_cast<uint16_t>(round_to_bfloat16(exact, random));
    }
  }
}

}  // namespace
}  // namespace fastunlearn
