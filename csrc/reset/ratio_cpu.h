// Ratios of 32 neighbours, the elements of one mask word.
#pragma once

#include "common/cpu.h"
#include "reset/ratio.h"

namespace fastunlearn {

inline constexpr int kWordBits = 32;

// Without a branch on the size in the common case, so that the loop becomes a few vectors.
template <typename Importance>
FASTUNLEARN_INLINE void importance_ratios(const Importance* forget, const Importance* retain,
                                          CpuAccumulator<Importance> eps, int64_t size,
                                          float* ratios) {
  if (size >= kWordBits) {
    for (int j = 0; j < kWordBits; ++j) {
      ratios[j] = importance_ratio(widen(forget[j]), widen(retain[j]), eps);
    }
    return;
  }
  for (int j = 0; j < kWordBits; ++j) {
    ratios[j] =
        j < size ? importance_ratio(widen(forget[j]), widen(retain[j]), eps) : __builtin_nanf("");
  }
}

}  // namespace fastunlearn
