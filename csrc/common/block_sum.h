// Long sums in blocks: a rounding error that grows with kSumBlock + n / kSumBlock instead of n, for
// one more addition in kSumBlock.
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

// The same on a CPU, where a total in double costs nothing: the error of one block, however long.
template <typename T>
struct LongSum {
  double total = 0;
  T block = 0;
  int count = 0;

  void add(T value) {
    block += value;
    if (++count == kSumBlock) {
      total += block;
      block = 0;
      count = 0;
    }
  }
  T value() const { return static_cast<T>(total + block); }
};

}  // namespace fastunlearn
