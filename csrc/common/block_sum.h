// Long sums in blocks: a rounding error that grows with kSumBlock + n / kSumBlock instead of n,
// which keeps float32 sums within a factor of two of torch's cascade, for one more addition in
// kSumBlock.
#pragma once

#include "common/host_device.h"

namespace fastunlearn {

inline constexpr int kSumBlock = 16;

template <typename T>
struct BlockSum {
  T total = 0;
  T block = 0;
  int count = 0;

  FASTUNLEARN_HOST_DEVICE void add(T value) {
    block += value;
    if (++count == kSumBlock) {
      total += block;
      block = 0;
      count = 0;
    }
  }
  FASTUNLEARN_HOST_DEVICE T value() const { return total + block; }
};

}  // namespace fastunlearn
