// The geometry of a convolution, checked at an operator's door.
#pragma once

#include <algorithm>
#include <climits>
#include <vector>

#include "common/check.h"
#include "common/conv2d.h"

namespace fastunlearn {

// What kernels hold in an int.
inline bool fits_int(int64_t value) { return value < INT_MAX; }

// `images` is [N, C, H, W] with C a multiple of `groups`.
inline Conv2dGeometry conv2d_geometry(const char* op, const char* name, const Tensor& images,
                                      int64_t groups, const std::vector<int64_t>& kernel,
                                      const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding,
                                      const std::vector<int64_t>& dilation) {
  check(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
        ": kernel size, stride, padding and dilation are pairs (vertical, horizontal)");
  check(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && padding[0] >= 0 &&
            padding[1] >= 0,
        op, ": stride and dilation must be positive and padding not negative");
  // Offsets inside one sample, coordinates inside the padded image and the taps of one channel
  // are int in the kernels.
  check(fits_int(product(images, 1, 4)) &&
            fits_int(images.size(1) / groups * kernel[0] * kernel[1]) &&
            fits_int(images.size(2) + 2 * padding[0] + dilation[0] * kernel[0]) &&
            fits_int(images.size(3) + 2 * padding[1] + dilation[1] * kernel[1]),
        op, ": one sample of ", name, " ", describe(images),
        " has 2^31 elements or more, or its padding or dilation is as large");
  const int64_t out_h =
      conv_out_size(images.size(2), kernel[0], stride[0], padding[0], dilation[0]);
  const int64_t out_w =
      conv_out_size(images.size(3), kernel[1], stride[1], padding[1], dilation[1]);
  check(fits_int(out_h * out_w), op, ": ", name, " ", describe(images), " has ", out_h, " x ",
        out_w, " positions, 2^31 or more");
  auto as_int = [](int64_t value) { return static_cast<int>(std::min<int64_t>(value, INT_MAX)); };
  return {as_int(images.size(1) / groups),
          as_int(images.size(2)),
          as_int(images.size(3)),
          as_int(kernel[0]),
          as_int(kernel[1]),
          as_int(out_h),
          as_int(out_w),
          as_int(stride[0]),
          as_int(stride[1]),
          as_int(padding[0]),
          as_int(padding[1]),
          as_int(dilation[0]),
          as_int(dilation[1])};
}

}  // namespace fastunlearn
