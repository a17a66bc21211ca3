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
  // unsigned: what lies before the image wraps to beyond its end, so that one comparison tells, and
  // offsets of places outside, which are never used, may overflow.
  struct Feature {
    unsigned offset;       // of the tap at the image's corner inside a sample
    unsigned row, column;  // where the tap lies relative to the patch's corner; 2^31 outside
  };
  struct Position {
    const Scalar* sample;  // null outside
    unsigned offset;       // of the patch's corner inside a plane
    unsigned row, column;  // the same
  };

  const Scalar* data;
  int groups;
  Conv2dGeometry geometry;

  __device__ __forceinline__ Feature feature(int64_t group, int64_t index) const {
    const Conv2dGeometry& g = geometry;
    const int taps = g.kernel_h * g.kernel_w;
    // A patch's rows go from -padding to below 2^31, and no image with such a padding reaches 2^31
    // less that: the sum with this row is never inside.
    if (index >= g.channels * taps) return {0, 1u << 31, 0};
    const int at = static_cast<int>(index);
    const unsigned channel = static_cast<unsigned>(group) * g.channels + at / taps;
    const unsigned row = at % taps / g.kernel_w * g.dilation_h;
    const unsigned column = at % taps % g.kernel_w * g.dilation_w;
    return {(channel * g.height + row) * g.width + column, row, column};
  }
  __device__ __forceinline__ Position position(int64_t, int64_t sample, int64_t t,
                                               int64_t last) const {
    const Conv2dGeometry& g = geometry;
    if (sample >= last || t >= g.out_h * g.out_w) return {nullptr, 0, 0, 0};
    const int64_t stride = static_cast<int64_t>(groups) * g.channels * g.height * g.width;
    const int at = static_cast<int>(t);
    const unsigned row = at / g.out_w * g.stride_h - g.padding_h;
    const unsigned column = at % g.out_w * g.stride_w - g.padding_w;
    return {data + sample * stride, row * g.width + column, row, column};
  }
  // Null outside.
  __device__ __forceinline__ const Scalar* address(const Feature& tap,
                                                   const Position& patch) const {
    const bool inside = patch.sample != nullptr &&
                        patch.row + tap.row < static_cast<unsigned>(geometry.height) &&
                        patch.column + tap.column < static_cast<unsigned>(geometry.width);
    return inside ? patch.sample + (patch.offset + tap.offset) : nullptr;
  }
  __device__ __forceinline__ Accumulator<Scalar> load(const Feature& tap,
                                                      const Position& patch) const {
    const Scalar* at = address(tap, patch);
    return at != nullptr ? widen(*at) : Accumulator<Scalar>(0);
  }
};

}  // namespace fastunlearn
