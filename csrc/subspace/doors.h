// The door of the subspace operator: every back end asks the same of its arguments, here and once.
// It returns contiguous tensors and the sizes; it raises before anything is written.
#pragma once

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/conv2d_door.h"
#include "subspace/gram_conv2d.h"

namespace fastunlearn {

struct GramConv2dDoor {
  Tensor images;
  std::optional<Tensor> weights;
  GramShape shape;
  Conv2dGeometry geometry;

  GramConv2dDoor(const Tensor& gram, const Tensor& images_, const std::vector<int64_t>& kernel,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, std::optional<Tensor> weights_)
      : images(images_), weights(std::move(weights_)) {
    constexpr const char* op = "gram_accumulate_conv2d_";
    check_output(op, "gram", gram);
    check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double, op,
          ": gram is ", describe(gram), "; second moments are kept in float32 or float64");
    check(gram.dim() == 3 && gram.size(1) == gram.size(2), op, ": gram is ", describe(gram),
          ", expected [groups, D, D]");
    check(same_device(images, gram), op, ": images are ", describe(images), " but gram is ",
          describe(gram), "; move both to one device");
    check(is_storage_type(images.scalar_type()), op, ": images are ", describe(images),
          "; float32, bfloat16, float16 or float64 is needed");
    const ScalarType accumulator = accumulator_of(images.scalar_type());
    check(accumulator == ScalarType::Float || gram.scalar_type() == ScalarType::Double, op,
          ": images are ", describe(images), " and need a float64 gram, got ", describe(gram));
    check(images.dim() == 4, op, ": images are ", describe(images), ", expected [N, C, H, W]");
    check(kernel.size() == 2 && kernel[0] > 0 && kernel[1] > 0, op,
          ": kernel_size is a pair (vertical, horizontal) of positive numbers");
    const int64_t groups = gram.size(0);
    const int64_t channels = images.size(1);
    check(groups > 0 && channels % groups == 0 && fits_int(kernel[0]) && fits_int(kernel[1]) &&
              gram.size(1) == channels / groups * kernel[0] * kernel[1],
          op, ": gram is ", describe(gram), " and images are ", describe(images),
          "; expected gram [groups, D, D] with D = ", channels, " / groups * ", kernel[0], " * ",
          kernel[1]);
    geometry = conv2d_geometry(op, "images", images, groups, kernel, stride, padding, dilation);
    check(geometry.out_h > 0 && geometry.out_w > 0, op, ": images ", describe(images),
          " with padding (", padding[0], ", ", padding[1], ") are smaller than a kernel of ",
          kernel[0], " x ", kernel[1], " with dilation (", dilation[0], ", ", dilation[1], ")");
    if (weights) {
      check(same_device(*weights, gram) && weights->scalar_type() == accumulator &&
                weights->dim() == 1 && weights->size(0) == images.size(0),
            op, ": weights are ", describe(*weights), ", expected ",
            torch::headeronly::toString(accumulator), " [", images.size(0),
            "], one per image, on the device of gram");
      weights = readable(op, "weights", *weights, gram, "gram");
    }
    images = readable(op, "images", images, gram, "gram");
    shape = {groups, gram.size(1), images.size(0), int64_t{geometry.out_h} * geometry.out_w};
  }
};

}  // namespace fastunlearn
