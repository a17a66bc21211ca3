// bfloat16 as in <cuda_bf16.h>: storage and conversions, no arithmetic (we accumulate in fp32).
#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16;
inline __nv_bfloat16 __float2bfloat16_rn(float x);
inline float __bfloat162float(__nv_bfloat16 x);

struct alignas(2) __nv_bfloat16 {
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) { *this = __float2bfloat16_rn(x); }
  operator float() const { return __bfloat162float(*this); }

 private:
  uint16_t bits_;
  friend __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits);
  friend unsigned short __bfloat16_as_ushort(__nv_bfloat16 x);
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits_ = bits;
  return x;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits_; }

inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(x)) << 16);
}

// To nearest, ties to even: adding half an ulp less one, plus the last kept bit, carries exactly
// when rounding up is due. A NaN must not be carried into an infinity; CUDA returns this one.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return __ushort_as_bfloat16(0x7fff);
  return __ushort_as_bfloat16(
      static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16));
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
