// One channel of an image with its padding written out: there the patches of all positions lie at
// the same distances from one another for every tap of a kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/conv2d.h"
#include "common/conv2d_door.h"

namespace fastunlearn {

struct PaddedPlane {
  Conv2dGeometry geometry;
  int height, width;

  explicit PaddedPlane(const Conv2dGeometry& g)
      : geometry(g), height(g.height + 2 * g.padding_h), width(g.width + 2 * g.padding_w) {}

  int64_t size() const { return int64_t{height} * width; }
  // Of the first position's patch.
  int64_t tap_offset(int64_t tap) const {
    return tap / geometry.kernel_w * geometry.dilation_h * width +
           tap % geometry.kernel_w * geometry.dilation_w;
  }
  // How far the patch of every position lies from the first one's, in numbers of `scale` elements.
  std::vector<int> position_offsets(const char* op, int scale) const {
    check(fits_int(size() * scale), op, ": an image padded to ", height, " x ", width,
          " has 2^31 elements or more");
    std::vector<int> offsets;
    offsets.reserve(int64_t{geometry.out_h} * geometry.out_w);
    for (int row = 0; row < geometry.out_h; ++row) {
      for (int column = 0; column < geometry.out_w; ++column)
        offsets.push_back((row * geometry.stride_h * width + column * geometry.stride_w) * scale);
    }
    return offsets;
  }
};

}  // namespace fastunlearn
