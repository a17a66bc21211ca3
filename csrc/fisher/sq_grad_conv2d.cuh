// Convolution as the same product over patches (implicit im2col).
#pragma once

#include "common/patch_operand.cuh"
#include "fisher/sq_grad_tile.cuh"

namespace fastunlearn {

// The output gradient [N, G P, T], positions contiguous.
template <typename Scalar>
struct PlaneOperand {
  static constexpr bool kPositionsContiguous = true;
  using Feature = int;             // offset of the plane inside a sample, negative outside
  using Position = const Scalar*;  // the position in the sample's first plane, null outside

  const Scalar* data;
  int groups;
  int features;  // per group
  int positions;

  __device__ __forceinline__ Feature feature(int64_t group, int64_t index) const {
    return index < features ? static_cast<int>(group * features + index) * positions : -1;
  }
  __device__ __forceinline__ Position position(int64_t, int64_t sample, int64_t t,
                                               int64_t last) const {
    const int64_t stride = groups * features * positions;
    return sample < last && t < positions ? data + sample * stride + t : nullptr;
  }
  __device__ __forceinline__ Accumulator<Scalar> load(Feature plane, Position at) const {
    return plane >= 0 && at != nullptr ? widen(at[plane]) : Accumulator<Scalar>(0);
  }
};

}  // namespace fastunlearn
