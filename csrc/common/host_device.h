// For the few lines of arithmetic that CPU and CUDA kernels share word for word.
#pragma once

#ifdef __CUDACC__
#define FASTUNLEARN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTUNLEARN_HOST_DEVICE inline __attribute__((always_inline))
#endif

#ifdef __CUDA_ARCH__
#define FASTUNLEARN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define FASTUNLEARN_UNROLL  // nvcc's host half knows neither spelling
#else
#define FASTUNLEARN_UNROLL _Pragma("GCC unroll 16")
#endif
