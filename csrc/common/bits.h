// Floating-point numbers as their bits, and back, on CPU and GPU.
#pragma once

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace fastunlearn {

FASTUNLEARN_HOST_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}
FASTUNLEARN_HOST_DEVICE uint64_t bits_of(double x) {
#ifdef __CUDA_ARCH__
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  return std::bit_cast<uint64_t>(x);
#endif
}
FASTUNLEARN_HOST_DEVICE float number_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}
FASTUNLEARN_HOST_DEVICE double number_of(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __longlong_as_double(static_cast<long long>(bits));
#else
  return std::bit_cast<double>(bits);
#endif
}

}  // namespace fastunlearn
