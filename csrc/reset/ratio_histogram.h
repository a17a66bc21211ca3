// Counts of ratios by digits of their bit pattern. The bits of a float that is not negative are
// ordered like the float, so three levels of 11, 10 and 10 bits find any rank exactly; the first
// one, exponent and three bits of mantissa, is a histogram with eight bins an octave.
#pragma once

#include "common/host_device.h"
#include "common/tensor_list.h"

namespace fastunlearn {

enum HistogramPointer { kHistogramForget, kHistogramRetain, kHistogramPointers };

inline constexpr int kRatioLevels = 3;
inline constexpr int kRatioBins = 2048;

struct RatioHistogramParams {
  TensorList<kHistogramPointers> list;
  const double* eps;      // [tensors]
  const int32_t* prefix;  // [rows], the digits of the levels before
  int64_t* counts;        // [rows, kRatioBins], added to
  bool per_tensor;        // a row for each tensor, or one for all
  int32_t level;
};

// How a level reads the bits of a ratio.
struct RatioDigit {
  int32_t shift, mask, prefix_shift;

  FASTUNLEARN_HOST_DEVICE explicit RatioDigit(int level)
      : shift(20 - 10 * level),
        mask(level == 0 ? kRatioBins - 1 : 1023),
        // Above the sign bit there is nothing: at level 0 every ratio matches prefix 0.
        prefix_shift(level == 0 ? 31 : 30 - 10 * level) {}

  FASTUNLEARN_HOST_DEVICE bool matches(int32_t bits, int32_t prefix) const {
    return bits >> prefix_shift == prefix;
  }
  FASTUNLEARN_HOST_DEVICE int32_t digit(int32_t bits) const { return bits >> shift & mask; }
};

}  // namespace fastunlearn
