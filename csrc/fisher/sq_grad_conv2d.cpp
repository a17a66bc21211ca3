// sq_grad_conv2d on a CPU: output channels are lanes, the taps of a patch are rows. A row is read
// from the padded image, where the patches of all positions lie at the same distance from one
// another for every tap: nothing is unfolded.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "common/dispatch.h"
#include "fisher/doors.h"
#include "fisher/sq_grad_grouped_cpu.h"
#include "fisher/sq_grad_tile_cpu.h"

namespace fastunlearn {
namespace {

// The output gradient [N, G P, T], transposed into panels [T, kSquareLanes].
template <typename Scalar>
struct ChannelLanes {
  using Acc = CpuAccumulator<Scalar>;
  const Scalar* data;
  int64_t groups, positions, count;

  void pack(int64_t group, int64_t sample, int64_t first, Acc* panel) const {
    constexpr int kLanes = kSquareLanes<Acc>;
    const int valid = static_cast<int>(std::min<int64_t>(kLanes, count - first));
    const Scalar* from = data + ((sample * groups + group) * count + first) * positions;
    if constexpr (std::is_same_v<Scalar, Acc>) {
      transpose_cpu(from, positions, valid, static_cast<int>(positions), false, panel, kLanes);
    } else {
      for (int j = 0; j < valid; ++j) {
        for (int64_t t = 0; t < positions; ++t)
          panel[t * kLanes + j] = widen(from[j * positions + t]);
      }
    }
    for (int64_t t = 0; valid < kLanes && t < positions; ++t)
      std::fill(panel + t * kLanes + valid, panel + (t + 1) * kLanes, Acc(0));
  }
};

// The images [N, G C, H, W], a row per (channel, tap): one packed unit per channel, the padded
// plane.
template <typename Scalar>
struct TapRows {
  using Acc = CpuAccumulator<Scalar>;
  static constexpr bool kConverted = !std::is_same_v<Scalar, Acc>;

  const Scalar* data;
  int64_t groups;
  Conv2dGeometry g;
  int height, width;  // padded
  int taps;
  int64_t count;
  bool direct;  // read in place: nothing to pad, nothing to convert
  int64_t units, unit_size;
  std::vector<int> offsets;

  TapRows(const Scalar* data, int64_t groups, const Conv2dGeometry& geometry)
      : data(data),
        groups(groups),
        g(geometry),
        height(g.height + 2 * g.padding_h),
        width(g.width + 2 * g.padding_w),
        taps(g.kernel_h * g.kernel_w),
        count(int64_t{g.channels} * taps),
        direct(!kConverted && g.padding_h == 0 && g.padding_w == 0),
        units(direct ? 0 : g.channels),
        unit_size(direct ? 0 : int64_t{height} * width),
        offsets(int64_t{g.out_h} * g.out_w) {
    for (int row = 0; row < g.out_h; ++row) {
      for (int column = 0; column < g.out_w; ++column)
        offsets[row * g.out_w + column] = row * g.stride_h * width + column * g.stride_w;
    }
  }

  void pack(int64_t group, int64_t sample, int64_t channel, Acc* to) const {
    const int64_t plane = int64_t{g.height} * g.width;
    const Scalar* from = data + ((sample * groups + group) * g.channels + channel) * plane;
    std::fill(to, to + g.padding_h * width, Acc(0));
    to += g.padding_h * width;
    for (int row = 0; row < g.height; ++row, to += width, from += g.width) {
      std::fill(to, to + g.padding_w, Acc(0));
      for (int column = 0; column < g.width; ++column)
        to[g.padding_w + column] = widen(from[column]);
      std::fill(to + g.padding_w + g.width, to + width, Acc(0));
    }
    std::fill(to, to + g.padding_h * width, Acc(0));
  }
  const Acc* point(int64_t group, int64_t sample, int64_t n, const Acc* packed, int64_t chunk,
                   int64_t row) const {
    const int64_t channel = row / taps;
    const int tap = static_cast<int>(row % taps);
    const int64_t offset =
        int64_t{tap / g.kernel_w} * g.dilation_h * width + int64_t{tap % g.kernel_w} * g.dilation_w;
    if constexpr (!kConverted) {
      if (direct)
        return data + ((sample * groups + group) * g.channels + channel) * height * width + offset;
    }
    return packed + (channel * chunk + n) * unit_size + offset;
  }
  int64_t step() const {
    return direct ? groups * g.channels * int64_t{height} * width : unit_size;
  }
};

void sq_grad_conv2d_cpu(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups, bool /*allow_tf32*/) {
  const Conv2dDoor door(out, input, grad_output, stride, padding, dilation, groups);
  const SqGradShape& s = door.shape;
  if (out.numel() == 0 || s.samples == 0 || s.positions == 0) return;
  dispatch_storage<CpuTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    using Acc = CpuAccumulator<Scalar>;
    const auto* images = static_cast<const Scalar*>(door.input.const_data_ptr());
    const auto* grads = static_cast<const Scalar*>(door.grad.const_data_ptr());
    Acc* result = static_cast<Acc*>(out.mutable_data_ptr());
    if (groups_fill_lanes<Acc>(s, door.geometry)) {
      return sq_grad_grouped_cpu(s, door.geometry, images, grads, result);
    }
    const ChannelLanes<Scalar> lanes{grads, groups, s.positions, s.out_features};
    sq_grad_cpu<true>(out, s, lanes, TapRows<Scalar>(images, groups, door.geometry), result);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_conv2d", TORCH_BOX(&sq_grad_conv2d_cpu));
}

}  // namespace fastunlearn
