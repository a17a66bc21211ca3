// Long sums in blocks of blocks: a rounding error that grows with 2 kSumBlock + n / kSumBlock^2
// instead of n, which keeps float32 sums close to torch's cascade for little more than one addition
// a term.
#pragma once

#include "common/host_device.h"

namespace fastunlearn {

inline constexpr int kSumBlock = 16;

template <typename T>
struct BlockSum {
  T total = 0;
  T blocks = 0;  // of up to kSumBlock blocks
  T block = 0;
  int count = 0;

  FASTUNLEARN_HOST_DEVICE void add(T value) {
    block += value;
    if (++count % kSumBlock != 0) return;
    blocks += block;
    block = 0;
    if (count < kSumBlock * kSumBlock) return;
    total += blocks;
    blocks = 0;
    count = 0;
  }
  FASTUNLEARN_HOST_DEVICE T value() const { return total + (blocks + block); }
};

}  // namespace fastunlearn
