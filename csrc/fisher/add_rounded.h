// add_rounded_: sums kept in bfloat16, rounded up or down at random so that they are right on
// average. Rounding to nearest loses every addend below 2^-9 of its sum, this none that a float32
// sum keeps.
//
// The random bits of an element are a function of (seed, step, position) and of nothing else, where
// the position is offset + index: a part of a tensor that begins at `offset` gets the bits that the
// whole would.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/tensor_list.h"

namespace fastunlearn {

// Positions that share one Philox counter: 128 bits, 16 each, lower halves of words first.
inline constexpr int kOctet = 8;

FASTUNLEARN_HOST_DEVICE PhiloxWords rounding_words(uint64_t seed, uint64_t step, uint64_t octet) {
  return philox(seed, octet, step);
}

// The bits of the bfloat16 below or above x: above with probability (lower half of x) / 2^16, by
// the carry out of that half. Both signs alike, because floats are sign and magnitude. What has no
// lower half is never moved: numbers that fit, and infinities. Beyond the largest finite number
// (0x7f7f) it rounds to nearest, so that noise makes no infinity; NaN is one and the same NaN on
// every device.
FASTUNLEARN_HOST_DEVICE uint32_t round_to_bfloat16(float x, uint32_t random16) {
  const uint32_t bits = bits_of(x);
  const uint32_t noise = (bits & 0x7fffffffu) >= 0x7f7f0000u ? 0x8000u : random16;
  const uint32_t rounded = (bits + noise) >> 16;
  return x != x ? 0x7fc0u : rounded;  // compared as bits, g++ 12 does not vectorise it
}

enum AddRoundedPointer { kRoundedSum, kAddend, kAddRoundedPointers };

struct AddRoundedParams {
  TensorList<kAddRoundedPointers> list;
  int64_t offsets[kListTensors];  // position of element 0 of each entry
  uint64_t seed, step;
};
static_assert(sizeof(AddRoundedParams) <= 32764, "kernel arguments");

}  // namespace fastunlearn
