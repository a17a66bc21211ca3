// Storage types of device code and the type that sums of them are kept in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastunlearn {

struct CudaTypes {
  using Float = float;
  using BFloat16 = __nv_bfloat16;
  using Half = __half;
  using Double = double;
};

template <typename Scalar>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename Scalar>
using Accumulator = typename AccumulatorOf<Scalar>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// The nearest Scalar.
template <typename Scalar>
__device__ __forceinline__ Scalar narrow(Accumulator<Scalar> x) {
  return static_cast<Scalar>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

}  // namespace fastunlearn
