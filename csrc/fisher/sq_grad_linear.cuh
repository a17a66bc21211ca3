// Linear: both operands are rows of features.
#pragma once

#include "fisher/sq_grad_tile.cuh"

namespace fastunlearn {

// [N, T, features], features contiguous.
template <typename Scalar>
struct RowOperand {
  static constexpr bool kPositionsContiguous = false;
  using Feature = int64_t;         // negative outside
  using Position = const Scalar*;  // null outside

  const Scalar* data;
  int64_t positions;
  int64_t features;

  __device__ __forceinline__ Feature feature(int64_t, int64_t index) const {
    return index < features ? index : -1;
  }
  __device__ __forceinline__ Position position(int64_t, int64_t sample, int64_t t,
                                               int64_t last) const {
    return sample < last && t < positions ? data + (sample * positions + t) * features : nullptr;
  }
  __device__ __forceinline__ Accumulator<Scalar> load(Feature feature, Position row) const {
    return feature >= 0 && row != nullptr ? widen(row[feature]) : Accumulator<Scalar>(0);
  }
};

}  // namespace fastunlearn
