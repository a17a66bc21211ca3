// sq_grad_conv2d on a CPU: output channels are lanes, the taps of a patch are rows. A row is read
// from the padded image: nothing is unfolded.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/padded_plane.h"
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

// The images [N, G C, H, W], a row per (channel, tap): a packed block per channel, its padded
// plane.
template <typename Scalar>
struct TapRows {
  using Acc = CpuAccumulator<Scalar>;
  static constexpr bool kConverted = !std::is_same_v<Scalar, Acc>;

  const Scalar* data;
  int64_t groups;
  PaddedPlane plane;
  int taps;
  int64_t count;
  bool direct;  // read in place: nothing to pad, nothing to convert
  int64_t blocks, block_size;
  std::vector<int> offsets;

  TapRows(const Scalar* data, int64_t groups, const Conv2dGeometry& g)
      : data(data),
        groups(groups),
        plane(g),
        taps(g.kernel_h * g.kernel_w),
        count(int64_t{g.channels} * taps),
        direct(!kConverted && g.padding_h == 0 && g.padding_w == 0),
        blocks(direct ? 0 : g.channels),
        block_size(direct ? 0 : plane.size()),
        offsets(plane.position_offsets("sq_grad_conv2d", 1)) {}

  void pack(int64_t group, int64_t sample, int64_t channel, Acc* to) const {
    const Conv2dGeometry& g = plane.geometry;
    const int64_t size = int64_t{g.height} * g.width;
    const Scalar* from = data + ((sample * groups + group) * g.channels + channel) * size;
    const int64_t margin = int64_t{g.padding_h} * plane.width;
    std::fill(to, to + margin, Acc(0));
    to += margin;
    for (int row = 0; row < g.height; ++row, to += plane.width, from += g.width) {
      std::fill(to, to + g.padding_w, Acc(0));
      for (int column = 0; column < g.width; ++column)
        to[g.padding_w + column] = widen(from[column]);
      std::fill(to + g.padding_w + g.width, to + plane.width, Acc(0));
    }
    std::fill(to, to + margin, Acc(0));
  }
  const Acc* row_pointer(int64_t group, int64_t sample, int64_t n, const Acc* packed, int64_t chunk,
                         int64_t row) const {
    const int64_t channel = row / taps;
    const int64_t offset = plane.tap_offset(row % taps);
    if constexpr (!kConverted) {
      if (direct)
        return data + (sample * groups + group) * step_of_group() + channel * plane.size() + offset;
    }
    return packed + (channel * chunk + n) * block_size + offset;
  }
  int64_t step() const { return direct ? groups * step_of_group() : block_size; }

 private:
  int64_t step_of_group() const { return plane.geometry.channels * plane.size(); }
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
      return SqGradGrouped<Scalar>(s, door.geometry, images, grads).run(out);
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
