// The geometry of a 2-d convolution.
#pragma once

#include <cstdint>

namespace fastunlearn {

// int: what one sample holds is below 2^31 elements, which the door checks. Half the registers of
// int64_t.
struct Conv2dGeometry {
  int channels;       // input channels per group
  int height, width;  // of the input
  int kernel_h, kernel_w;
  int out_h, out_w;
  int stride_h, stride_w;
  int padding_h, padding_w;
  int dilation_h, dilation_w;
};

// Output extent of one axis, as torch computes it.
inline int64_t conv_out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                             int64_t dilation) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

}  // namespace fastunlearn
