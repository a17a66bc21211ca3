// The patches under a convolution as a factor of a product: implicit im2col.
#pragma once

#include "common/conv2d.h"
#include "common/scalar.cuh"

namespace fastunlearn {

// The patches of an image [N, G C, H, W]: feature (c, i, j) of position (oh, ow) is
// image[c, oh stride_h - padding_h + i dilation_h, ow stride_w - padding_w + j dilation_w].
template <typename Scalar>
struct PatchOperand {
  static constexpr bool kPositionsContiguous = true;
  struct Feature {
    int channel;      // offset of the channel's plane inside a sample, negative outside
    int row, column;  // where the tap lies relative to the patch's corner
  };
  struct Position {
    const Scalar* sample;  // null outside
    int row, column;       // the patch's corner, may be negative inside the padding
  };

  const Scalar* data;
  int groups;
  Conv2dGeometry geometry;

  __device__ __forceinline__ Feature feature(int64_t group, int64_t index) const {
    const Conv2dGeometry& g = geometry;
    const int taps = g.kernel_h * g.kernel_w;
    if (index >= g.channels * taps) return {-1, 0, 0};
    const int at = static_cast<int>(index);
    return {(static_cast<int>(group) * g.channels + at / taps) * g.height * g.width,
            at % taps / g.kernel_w * g.dilation_h, at % taps % g.kernel_w * g.dilation_w};
  }
  __device__ __forceinline__ Position position(int64_t, int64_t sample, int64_t t,
                                               int64_t last) const {
    const Conv2dGeometry& g = geometry;
    if (sample >= last || t >= g.out_h * g.out_w) return {nullptr, 0, 0};
    const int64_t stride = groups * g.channels * g.height * g.width;
    const int at = static_cast<int>(t);
    return {data + sample * stride, at / g.out_w * g.stride_h - g.padding_h,
            at % g.out_w * g.stride_w - g.padding_w};
  }
  // Null outside.
  __device__ __forceinline__ const Scalar* address(const Feature& tap,
                                                   const Position& patch) const {
    const int row = patch.row + tap.row;
    const int column = patch.column + tap.column;
    const bool inside = patch.sample != nullptr && tap.channel >= 0 && row >= 0 &&
                        row < geometry.height && column >= 0 && column < geometry.width;
    return inside ? patch.sample + (tap.channel + row * geometry.width + column) : nullptr;
  }
  __device__ __forceinline__ Accumulator<Scalar> load(const Feature& tap,
                                                      const Position& patch) const {
    const Scalar* at = address(tap, patch);
    return at != nullptr ? widen(*at) : Accumulator<Scalar>(0);
  }
};

}  // namespace fastunlearn
