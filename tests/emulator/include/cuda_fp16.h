// IEEE half as in <cuda_fp16.h>: storage and conversions, no arithmetic (we accumulate in fp32).
// Bit arithmetic instead of _Float16, which not every compiler and target has.
#pragma once

#include <cuda_runtime.h>

struct __half;
inline __half __float2half_rn(float x);
inline float __half2float(__half x);

struct alignas(2) __half {
  __half() = default;
  explicit __half(float x) { *this = __float2half_rn(x); }
  operator float() const { return __half2float(*this); }

 private:
  uint16_t bits_;
  friend __half __ushort_as_half(unsigned short bits);
  friend unsigned short __half_as_ushort(__half x);
};

inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits_ = bits;
  return x;
}
inline unsigned short __half_as_ushort(__half x) { return x.bits_; }

inline float __half2float(__half x) {
  const unsigned bits = __half_as_ushort(x);
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu;
  const unsigned mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in fp32
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
  }
  // Infinity and NaN keep an exponent of all ones; the others are re-biased from 15 to 127.
  const unsigned wide = exponent == 31 ? 255 : exponent + (127 - 15);
  return __uint_as_float(sign | wide << 23 | mantissa << 13);
}

inline __half __float2half_rn(float x) {
  if (x != x) return __ushort_as_half(0x7fff);  // the NaN that CUDA returns
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude >= 0x47800000u) {  // 65536 and more; [65520, 65536) gets there by its carry below
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a subnormal. One ulp of 0.5f is 2^-24, just like one ulp of the
    // result, so the addition rounds (to even) and leaves the answer in the low bits.
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {  // re-bias the exponent, then round 13 bits away as in __float2bfloat16_rn
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return __ushort_as_half(static_cast<unsigned short>(sign | half));
}
inline __half __float2half(float x) { return __float2half_rn(x); }

struct alignas(4) __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
