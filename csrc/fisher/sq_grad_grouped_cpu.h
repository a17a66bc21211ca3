// Convolutions of many small groups on a CPU, depthwise ones above all: the lanes of the registers
// are groups, because one group has too few channels to fill them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/padded_plane.h"
#include "common/tasks_cpu.h"
#include "fisher/sq_grad_tile_cpu.h"

namespace fastunlearn {

inline constexpr int kGroupTaps = 9;  // products in registers at once: a 3 x 3 kernel
template <typename T>
inline constexpr int kGroupLanes = VectorOf<T>::kLanes;

// squares[k, l] += (sum_t taps[k][offsets[t], l] * grads[t, l])^2 for k < kGroupTaps and one vector
// of lanes l.
void square_group_cpu(const float* grads, const float* const* taps, const int* offsets,
                      int positions, float* squares);
void square_group_cpu(const double* grads, const double* const* taps, const int* offsets,
                      int positions, double* squares);

// What one thread lays out of a sample: its L2 cache, unless the lanes are full.
inline constexpr int64_t kGroupImageBytes = int64_t{1} << 20;
// Slices of the samples when few groups leave threads idle; their number shows in the bits, and so
// must not depend on the number of threads.
inline constexpr int64_t kGroupSlices = 16;

// With half the lanes filled by output channels, or with an image that leaves the cache, the tile
// kernel does as well.
template <typename T>
bool groups_fill_lanes(const SqGradShape& shape, const Conv2dGeometry& geometry) {
  constexpr int kLanes = kGroupLanes<T>;
  if (shape.groups < kLanes / 2 || shape.out_features > kLanes / 2) return false;
  const int64_t plane = PaddedPlane(geometry).size() * kLanes;
  return fits_int(plane) && (shape.groups >= kLanes ||
                             geometry.channels * plane * int64_t{sizeof(T)} <= kGroupImageBytes);
}

// A task owns kGroupLanes groups of a slice of the samples and lays out one sample of them after
// the other, groups last.
template <typename Scalar>
class SqGradGrouped {
 public:
  SqGradGrouped(const SqGradShape& shape, const Conv2dGeometry& geometry, const Scalar* images,
                const Scalar* grads)
      : shape_(shape),
        plane_(geometry),
        images_(images),
        grads_(grads),
        offsets_(plane_.position_offsets("sq_grad_conv2d", kLanes)),
        tap_blocks_(ceil_div(shape.in_features, kGroupTaps)),
        sums_(shape.out_features * tap_blocks_ * kGroupTaps * kLanes) {}

  void run(const Tensor& out) const {
    const int64_t lane_blocks = ceil_div(shape_.groups, kLanes);
    const int64_t slices =
        std::clamp<int64_t>(kGroupSlices / lane_blocks, 1, ceil_div(shape_.samples, kSumBlock));
    const int64_t slice = ceil_div(shape_.samples, slices);
    const int64_t count = out.numel();
    const Tensor partial = slices > 1 ? workspace<Acc>(out, slices * count) : out;
    Acc* target = static_cast<Acc*>(partial.mutable_data_ptr());
    if (slices > 1) std::fill(target, target + slices * count, Acc(0));
    for_each_task(
        lane_blocks * slices, [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t task) {
          const int64_t first = task / lane_blocks * slice;
          add_groups(scratch, task % lane_blocks * kLanes, first,
                     std::min(shape_.samples, first + slice), target + task / lane_blocks * count);
        });
    if (slices == 1) return;
    Acc* result = static_cast<Acc*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) {  // a weight of few groups: a few thousand numbers
      Acc sum = target[i];
      for (int64_t s = 1; s < slices; ++s) sum += target[s * count + i];
      result[i] += sum;
    }
  }

 private:
  using Acc = CpuAccumulator<Scalar>;
  static constexpr int kLanes = kGroupLanes<Acc>;

  struct Scratch {
    std::vector<CacheLine> memory;
    Acc *image, *grad, *block, *total;

    explicit Scratch(const SqGradGrouped& op) {
      const int64_t images = op.plane_.geometry.channels * op.plane_.size() * kLanes;
      const int64_t grads = op.shape_.out_features * op.shape_.positions * kLanes;
      memory.resize((images + grads + 2 * op.sums_) * sizeof(Acc) / sizeof(CacheLine));
      image = reinterpret_cast<Acc*>(memory.data());
      grad = image + images;
      block = grad + grads;
      total = block + op.sums_;
    }
  };

  void add_groups(Scratch& scratch, int64_t group, int64_t first, int64_t last, Acc* out) const {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, shape_.groups - group));
    // Padding, lanes without a group and sums start at zero; the first two stay so.
    std::fill(scratch.memory.begin(), scratch.memory.end(), CacheLine{});
    auto end_block = [&] {
      for (int64_t i = 0; i < sums_; ++i) scratch.total[i] += scratch.block[i];
      std::fill(scratch.block, scratch.block + sums_, Acc(0));
    };
    for (int64_t n = first; n < last; ++n) {
      lay_out(scratch, n, group, lanes);
      for (int64_t p = 0; p < shape_.out_features; ++p) {
        for (int64_t feature = 0; feature < shape_.in_features; feature += kGroupTaps) {
          const Acc* taps[kGroupTaps];
          for (int k = 0; k < kGroupTaps; ++k)  // after the last tap, the last one again
            taps[k] = tap(scratch, std::min(feature + k, shape_.in_features - 1));
          square_group_cpu(scratch.grad + p * shape_.positions * kLanes, taps, offsets_.data(),
                           static_cast<int>(shape_.positions),
                           scratch.block + (p * tap_blocks_ * kGroupTaps + feature) * kLanes);
        }
      }
      if ((n - first) % kSumBlock == kSumBlock - 1) end_block();
    }
    end_block();
    for (int64_t p = 0; p < shape_.out_features; ++p) {
      const Acc* from = scratch.total + p * tap_blocks_ * kGroupTaps * kLanes;
      for (int lane = 0; lane < lanes; ++lane) {
        Acc* to = out + ((group + lane) * shape_.out_features + p) * shape_.in_features;
        for (int64_t d = 0; d < shape_.in_features; ++d) to[d] += from[d * kLanes + lane];
      }
    }
  }

  const Acc* tap(const Scratch& scratch, int64_t feature) const {
    const int64_t taps = int64_t{plane_.geometry.kernel_h} * plane_.geometry.kernel_w;
    return scratch.image +
           (feature / taps * plane_.size() + plane_.tap_offset(feature % taps)) * kLanes;
  }

  void lay_out(Scratch& scratch, int64_t sample, int64_t group, int lanes) const {
    const Conv2dGeometry& g = plane_.geometry;
    const int64_t size = int64_t{g.height} * g.width;
    const int64_t first = sample * shape_.groups + group;
    for (int c = 0; c < g.channels; ++c) {
      const Scalar* channel = images_ + (first * g.channels + c) * size;
      const int64_t corner = c * plane_.size() + int64_t{g.padding_h} * plane_.width + g.padding_w;
      for (int row = 0; row < g.height; ++row)
        lay_row(channel + int64_t{row} * g.width, g.channels * size, lanes, g.width,
                scratch.image + (corner + int64_t{row} * plane_.width) * kLanes);
    }
    for (int64_t p = 0; p < shape_.out_features; ++p)
      lay_row(grads_ + (first * shape_.out_features + p) * shape_.positions,
              shape_.out_features * shape_.positions, lanes, static_cast<int>(shape_.positions),
              scratch.grad + p * shape_.positions * kLanes);
  }

  // to[column, lane] = from[lane, column].
  static void lay_row(const Scalar* from, int64_t lane_stride, int lanes, int columns, Acc* to) {
    if constexpr (std::is_same_v<Scalar, Acc>) {
      transpose_cpu(from, lane_stride, lanes, columns, false, to, kLanes);
    } else {
      for (int lane = 0; lane < lanes; ++lane) {
        for (int j = 0; j < columns; ++j)
          to[j * kLanes + lane] = widen(from[lane * lane_stride + j]);
      }
    }
  }

  SqGradShape shape_;
  PaddedPlane plane_;
  const Scalar* images_;
  const Scalar* grads_;
  std::vector<int> offsets_;
  int64_t tap_blocks_;  // of one output channel
  int64_t sums_;        // [out_features, tap_blocks, kGroupTaps, kLanes]
};

}  // namespace fastunlearn
