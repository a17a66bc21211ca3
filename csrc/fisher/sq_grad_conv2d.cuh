// Convolution as the same product over patches (implicit im2col).
#pragma once

#include "fisher/sq_grad_conv2d.h"
#include "fisher/sq_grad_tile.cuh"

namespace fastunlearn {

// The output gradient [N, G P, T], positions contiguous.
template <typename Scalar>
struct PlaneOperand {
  static constexpr bool kPositionsContiguous = true;
  using Feature = int64_t;         // offset of the plane inside a sample, negative outside
  using Position = const Scalar*;  // the position in the sample's first plane, null outside

  const Scalar* data;
  int64_t groups;
  int64_t features;  // per group
  int64_t positions;

  __device__ __forceinline__ Feature feature(int64_t group, int64_t index) const {
    return index < features ? (group * features + index) * positions : -1;
  }
  __device__ __forceinline__ Position position(int64_t, int64_t sample, int64_t t,
                                               int64_t last) const {
    return sample < last && t < positions ? data + sample * groups * features * positions + t
                                          : nullptr;
  }
  __device__ __forceinline__ Accumulator<Scalar> load(Feature plane, Position at) const {
    return plane >= 0 && at != nullptr ? widen(at[plane]) : Accumulator<Scalar>(0);
  }
};

// The patches of an image [N, G C, H, W]: feature (c, i, j) of position (oh, ow) is
// image[c, oh stride_h - padding_h + i dilation_h, ow stride_w - padding_w + j dilation_w].
template <typename Scalar>
struct PatchOperand {
  static constexpr bool kPositionsContiguous = true;
  struct Feature {
    int64_t channel;  // offset of the channel's plane inside a sample, negative outside
    int row, column;  // where the tap lies relative to the patch's corner
  };
  struct Position {
    const Scalar* sample;  // null outside
    int row, column;       // the patch's corner, may be negative inside the padding
  };

  const Scalar* data;
  int64_t groups;
  Conv2dGeometry geometry;

  __device__ __forceinline__ Feature feature(int64_t group, int64_t index) const {
    const int64_t taps = geometry.kernel_h * geometry.kernel_w;
    const int64_t channel = index / taps;
    const int tap = static_cast<int>(index % taps);
    const int kernel_w = static_cast<int>(geometry.kernel_w);
    if (channel >= geometry.channels) return {-1, 0, 0};
    return {(group * geometry.channels + channel) * geometry.height * geometry.width,
            tap / kernel_w * static_cast<int>(geometry.dilation_h),
            tap % kernel_w * static_cast<int>(geometry.dilation_w)};
  }
  __device__ __forceinline__ Position position(int64_t, int64_t sample, int64_t t,
                                               int64_t last) const {
    if (sample >= last || t >= geometry.out_h * geometry.out_w) return {nullptr, 0, 0};
    const int64_t plane = geometry.height * geometry.width;
    const int out_w = static_cast<int>(geometry.out_w);
    const int at = static_cast<int>(t);
    return {
        data + sample * groups * geometry.channels * plane,
        at / out_w * static_cast<int>(geometry.stride_h) - static_cast<int>(geometry.padding_h),
        at % out_w * static_cast<int>(geometry.stride_w) - static_cast<int>(geometry.padding_w)};
  }
  __device__ __forceinline__ Accumulator<Scalar> load(const Feature& tap,
                                                      const Position& patch) const {
    const int64_t row = patch.row + tap.row;
    const int64_t column = patch.column + tap.column;
    const bool inside = patch.sample != nullptr && tap.channel >= 0 && row >= 0 &&
                        row < geometry.height && column >= 0 && column < geometry.width;
    return inside ? widen(patch.sample[tap.channel + row * geometry.width + column])
                  : Accumulator<Scalar>(0);
  }
};

}  // namespace fastunlearn
