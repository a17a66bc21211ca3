// What the kernels over lists of tensors share: whose chunk a block has, and of what type.
#pragma once

#include "common/scalar.cuh"
#include "common/tensor_list.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

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

// Calls fn.template operator()<Scalar>(). One chunk has one type, so no warp diverges here.
template <typename Function>
__device__ __forceinline__ void visit_type(ElementType type, Function&& fn) {
  switch (type) {
    case kFloat:
      return fn.template operator()<float>();
    case kBFloat16:
      return fn.template operator()<__nv_bfloat16>();
    case kHalf:
      return fn.template operator()<__half>();
    case kDouble:
      return fn.template operator()<double>();
  }
}

}  // namespace
}  // namespace fastunlearn
