// Counter-based normal random numbers: the value is a function of (seed, row, column) and of
// nothing else, so it does not depend on who computes it, in which order, or in how many pieces.
//
// Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform with polynomials in exactly
// rounded operations (multiply, add, fused multiply-add, square root): CPU and GPU agree bit by
// bit.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace fastunlearn {

// Sums and products below must not be contracted by the compiler: each is written as it is rounded.
#ifdef __CUDA_ARCH__
FASTUNLEARN_HOST_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTUNLEARN_HOST_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
FASTUNLEARN_HOST_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
FASTUNLEARN_HOST_DEVICE float root(float a) { return __fsqrt_rn(a); }
#else
FASTUNLEARN_HOST_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTUNLEARN_HOST_DEVICE double fused(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
FASTUNLEARN_HOST_DEVICE float times(float a, float b) { return a * b; }
FASTUNLEARN_HOST_DEVICE float root(float a) { return __builtin_sqrtf(a); }
#endif

struct PhiloxWords {
  uint32_t x, y, z, w;
};

FASTUNLEARN_HOST_DEVICE PhiloxWords philox(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
  uint32_t c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  FASTUNLEARN_UNROLL  // without it no compiler vectorises the loop around
      for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0;
    const uint64_t second = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(second);
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

struct NormalPair {
  float first, second;
};

// Box-Muller: radius from 24 bits of one word, angle from 26 of the other. The largest magnitude is
// sqrt(50 ln 2) = 5.9, which one normal number in 250 million would pass.
FASTUNLEARN_HOST_DEVICE NormalPair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  // ln u of u = (24 bits + 1/2) 2^-24, as mantissa in [sqrt(1/2), sqrt(2)) and exponent (Cephes
  // logf).
  const float u = times(fused(static_cast<float>(radius_word >> 8), 1.0f, 0.5f), 0x1p-24f);
  const uint32_t bits = bits_of(u);
  // Adding the distance from sqrt(1/2) to 1 carries into the exponent where the mantissa is above
  // sqrt(2).
  const uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u);
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float f = fused(number_of((shifted & 0x007fffffu) + 0x3f3504f3u), 1.0f, -1.0f);
  const float f2 = times(f, f);
  float p = 7.0376836292e-2f;
  p = fused(p, f, -1.1514610310e-1f);
  p = fused(p, f, 1.1676998740e-1f);
  p = fused(p, f, -1.2420140846e-1f);
  p = fused(p, f, 1.4249322787e-1f);
  p = fused(p, f, -1.6668057665e-1f);
  p = fused(p, f, 2.0000714765e-1f);
  p = fused(p, f, -2.4999993993e-1f);
  p = fused(p, f, 3.3333331174e-1f);
  p = times(times(p, f), f2);
  p = fused(-0.5f, f2, p);
  const float log_u = fused(exponent, 0.693147180559945f, fused(p, 1.0f, f));
  const float radius = root(times(-2.0f, log_u));
  // The angle: a quarter turn from the two top bits, the rest in (-pi/4, pi/4).
  const uint32_t quarter = angle_word >> 30;
  const float t =
      times(fused(static_cast<float>((angle_word >> 6) & 0xffffffu), 1.0f, 0.5f - 0x1p23f),
            0x1p-24f * 1.57079632679489662f);
  const float t2 = times(t, t);
  float s = fused(-1.9515295891e-4f, t2, 8.3321608736e-3f);
  s = fused(s, t2, -1.6666654611e-1f);
  s = fused(times(s, t2), t, t);
  float c = fused(2.443315711809948e-5f, t2, -1.388731625493765e-3f);
  c = fused(c, t2, 4.166664568298827e-2f);
  c = fused(times(c, t2), t2, fused(-0.5f, t2, 1.0f));
  const float sine = quarter & 1 ? c : s;
  const float cosine = quarter & 1 ? -s : c;
  const float sign = quarter & 2 ? -radius : radius;
  return {times(sign, cosine), times(sign, sine)};
}

// Four standard normal numbers: rows 4 block to 4 block + 3 of one column of the matrix of `seed`.
struct NormalBlock {
  float value[4];
};

FASTUNLEARN_HOST_DEVICE NormalBlock normal_block(uint64_t seed, uint64_t block, uint64_t column) {
  const PhiloxWords words = philox(seed, block, column);
  const NormalPair a = normal_pair(words.x, words.y);
  const NormalPair b = normal_pair(words.z, words.w);
  return {{a.first, a.second, b.first, b.second}};
}

}  // namespace fastunlearn
