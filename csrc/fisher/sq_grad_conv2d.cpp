// sq_grad_conv2d on a CPU: patches are unfolded into the panel and nowhere else.
#include <torch/csrc/stable/library.h>

#include "common/dispatch.h"
#include "fisher/doors.h"
#include "fisher/sq_grad_tile_cpu.h"

namespace fastunlearn {
namespace {

// The output gradient [N, G P, T].
template <typename Scalar>
struct PlanePacker {
  const Scalar* data;
  SqGradShape shape;

  template <int kWidth>
  void operator()(const PanelRequest& request, CpuAccumulator<Scalar>* panel) const {
    const int64_t sample_stride = shape.groups * shape.out_features * shape.positions;
    const int64_t step = request.along_samples ? sample_stride : 1;
    const Scalar* corner = data + request.sample * sample_stride + request.position +
                           (request.group * shape.out_features + request.feature) * shape.positions;
    for (int j = 0; j < request.features; ++j) {
      const Scalar* plane = corner + j * shape.positions;
      for (int k = 0; k < request.depth; ++k) panel[k * kWidth + j] = widen(plane[k * step]);
    }
  }
};

// The patches of an image [N, G C, H, W]; feature = (c, i, j).
template <typename Scalar>
struct PatchPacker {
  const Scalar* data;
  int64_t groups;
  Conv2dGeometry geometry;

  template <int kWidth>
  void operator()(const PanelRequest& request, CpuAccumulator<Scalar>* panel) const {
    const Conv2dGeometry& g = geometry;
    const int taps = g.kernel_h * g.kernel_w;
    const int64_t plane = int64_t{g.height} * g.width;
    const Scalar* samples = data + (request.sample * groups + request.group) * g.channels * plane;
    const int64_t sample_stride = request.along_samples ? groups * g.channels * plane : 0;
    for (int j = 0; j < request.features; ++j) {
      const int64_t feature = request.feature + j;
      const int64_t tap = feature % taps;
      const Scalar* channel = samples + feature / taps * plane;
      const int64_t row_offset = tap / g.kernel_w * g.dilation_h - g.padding_h;
      const int64_t column_offset = tap % g.kernel_w * g.dilation_w - g.padding_w;
      int64_t out_row = request.position / g.out_w;
      int64_t out_column = request.position % g.out_w;
      for (int k = 0; k < request.depth; ++k) {
        const int64_t row = out_row * g.stride_h + row_offset;
        const int64_t column = out_column * g.stride_w + column_offset;
        const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
        panel[k * kWidth + j] = inside ? widen(channel[k * sample_stride + row * g.width + column])
                                       : CpuAccumulator<Scalar>(0);
        if (!request.along_samples && ++out_column == g.out_w) {
          out_column = 0;
          ++out_row;
        }
      }
    }
  }
};

void sq_grad_conv2d_cpu(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups, bool /*allow_tf32*/) {
  const Conv2dDoor door(out, input, grad_output, stride, padding, dilation, groups);
  if (door.shape.positions == 0) return;
  dispatch_storage<CpuTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const PlanePacker<Scalar> grads{static_cast<const Scalar*>(door.grad.const_data_ptr()),
                                    door.shape};
    const PatchPacker<Scalar> inputs{static_cast<const Scalar*>(door.input.const_data_ptr()),
                                     groups, door.geometry};
    sq_grad_cpu(door.shape, grads, inputs,
                static_cast<CpuAccumulator<Scalar>*>(out.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_conv2d", TORCH_BOX(&sq_grad_conv2d_cpu));
}

}  // namespace fastunlearn
