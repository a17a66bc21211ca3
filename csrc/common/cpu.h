// What CPU kernels share: one source compiled for several instruction sets, and vectors of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>

// One wheel for every x86-64: the loader picks the best clone once. Clones are non-template
// functions, and what they call must be inlined into them to be compiled for their instruction set.
// The resolver runs before a sanitizer's runtime is up, so sanitized builds have the plain function
// only.
#define FASTUNLEARN_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTUNLEARN_CPU_VERSIONS
#define FASTUNLEARN_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTUNLEARN_CPU_CLONES
#endif

namespace fastunlearn {

struct CpuTypes {
  using Float = float;
  using BFloat16 = c10::BFloat16;
  using Half = c10::Half;
  using Double = double;
};

template <typename Scalar>
struct CpuAccumulatorOf {
  using type = float;
};
template <>
struct CpuAccumulatorOf<double> {
  using type = double;
};
template <typename Scalar>
using CpuAccumulator = typename CpuAccumulatorOf<Scalar>::type;

FASTUNLEARN_INLINE float widen(float x) { return x; }
FASTUNLEARN_INLINE double widen(double x) { return x; }
FASTUNLEARN_INLINE float widen(c10::Half x) { return static_cast<float>(x); }
// bfloat16 is the upper half of a float: a shift that the compiler vectorises.
FASTUNLEARN_INLINE float widen(c10::BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}

// What aligned scratch memory is made of: std::vector<CacheLine> starts on 64 bytes.
struct alignas(64) CacheLine {
  unsigned char bytes[64];
};

// 64 bytes of T: one AVX-512 register, two of AVX2, four of SSE or NEON.
template <typename T, int kBytes = 64>
struct VectorOf {
  static constexpr int kLanes = kBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kBytes)));
  // The same, read and written at any address.
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

}  // namespace fastunlearn
