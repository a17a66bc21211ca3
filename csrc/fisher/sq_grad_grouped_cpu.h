// Convolutions of many small groups on a CPU, depthwise ones above all: the lanes of the registers
// are groups, because one group has too few channels to fill them.
#pragma once

#include <algorithm>
#include <climits>
#include <type_traits>
#include <vector>

#include "common/conv2d.h"
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

// A group with as many output channels as half a vector's lanes does as well with them for lanes.
template <typename T>
bool groups_fill_lanes(const SqGradShape& shape, const Conv2dGeometry& g) {
  const int64_t padded =
      (g.height + 2 * int64_t{g.padding_h}) * (g.width + 2 * int64_t{g.padding_w});
  return shape.groups >= kGroupLanes<T> / 2 && shape.out_features <= kGroupLanes<T> / 2 &&
         padded * kGroupLanes<T> < INT_MAX;  // offsets are int
}

// A task owns kGroupLanes groups and lays out one sample of them after the other, groups last.
template <typename Scalar>
void sq_grad_grouped_cpu(const SqGradShape& shape, const Conv2dGeometry& g, const Scalar* images,
                         const Scalar* grads, CpuAccumulator<Scalar>* out) {
  using Acc = CpuAccumulator<Scalar>;
  constexpr int kLanes = kGroupLanes<Acc>;
  const int height = g.height + 2 * g.padding_h;
  const int width = g.width + 2 * g.padding_w;
  const int64_t plane = int64_t{g.height} * g.width;
  const int64_t padded = int64_t{height} * width;
  const int positions = static_cast<int>(shape.positions);
  const int features = static_cast<int>(shape.in_features);
  const int per_channel = g.kernel_h * g.kernel_w;
  std::vector<int> offsets(shape.positions);
  for (int row = 0; row < g.out_h; ++row) {
    for (int column = 0; column < g.out_w; ++column) {
      offsets[row * g.out_w + column] = (row * g.stride_h * width + column * g.stride_w) * kLanes;
    }
  }
  const int64_t tap_blocks = ceil_div(features, kGroupTaps);
  const int64_t sums = shape.out_features * tap_blocks * kGroupTaps * kLanes;
  struct Scratch {
    std::vector<CacheLine> memory;
    Acc *image, *grad, *block, *total;
  };
  auto make_scratch = [&] {
    const int64_t image = g.channels * padded * kLanes;
    const int64_t grad = shape.out_features * positions * kLanes;
    Scratch scratch;
    scratch.memory.resize((image + grad + 2 * sums) * sizeof(Acc) / sizeof(CacheLine));
    scratch.image = reinterpret_cast<Acc*>(scratch.memory.data());
    scratch.grad = scratch.image + image;
    scratch.block = scratch.grad + grad;
    scratch.total = scratch.block + sums;
    return scratch;
  };
  // Writes to[column, lane] = from[lane, column].
  auto spread = [&](const Scalar* from, int64_t lane_stride, int lanes, int columns, Acc* to) {
    if constexpr (std::is_same_v<Scalar, Acc>) {
      transpose_cpu(from, lane_stride, lanes, columns, false, to, kLanes);
    } else {
      for (int lane = 0; lane < lanes; ++lane) {
        for (int j = 0; j < columns; ++j)
          to[j * kLanes + lane] = widen(from[lane * lane_stride + j]);
      }
    }
  };
  for_each_task(ceil_div(shape.groups, kLanes), make_scratch, [&](Scratch& scratch, int64_t task) {
    const int64_t group = task * kLanes;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, shape.groups - group));
    // Padding, lanes without a group and sums start at zero; the first two stay so.
    std::fill(scratch.memory.begin(), scratch.memory.end(), CacheLine{});
    auto end_block = [&] {
      for (int64_t i = 0; i < sums; ++i) scratch.total[i] += scratch.block[i];
      std::fill(scratch.block, scratch.block + sums, Acc(0));
    };
    for (int64_t n = 0; n < shape.samples; ++n) {
      for (int c = 0; c < g.channels; ++c) {
        const Scalar* channel = images + ((n * shape.groups + group) * g.channels + c) * plane;
        Acc* to =
            scratch.image + (c * padded + int64_t{g.padding_h} * width + g.padding_w) * kLanes;
        for (int row = 0; row < g.height; ++row)
          spread(channel + row * g.width, g.channels * plane, lanes, g.width,
                 to + int64_t{row} * width * kLanes);
      }
      for (int64_t p = 0; p < shape.out_features; ++p) {
        spread(grads + ((n * shape.groups + group) * shape.out_features + p) * positions,
               shape.out_features * positions, lanes, positions,
               scratch.grad + p * positions * kLanes);
        for (int first = 0; first < features; first += kGroupTaps) {
          const Acc* taps[kGroupTaps];
          for (int k = 0; k < kGroupTaps; ++k) {  // after the last tap, the last one again
            const int feature = std::min(first + k, features - 1);
            const int tap = feature % per_channel;
            const int64_t offset = int64_t{tap / g.kernel_w} * g.dilation_h * width +
                                   int64_t{tap % g.kernel_w} * g.dilation_w;
            taps[k] = scratch.image + (feature / per_channel * padded + offset) * kLanes;
          }
          square_group_cpu(scratch.grad + p * positions * kLanes, taps, offsets.data(), positions,
                           scratch.block + (p * tap_blocks * kGroupTaps + first) * kLanes);
        }
      }
      if (n % kSumBlock == kSumBlock - 1) end_block();
    }
    end_block();
    for (int64_t p = 0; p < shape.out_features; ++p) {
      const Acc* from = scratch.total + p * tap_blocks * kGroupTaps * kLanes;
      for (int lane = 0; lane < lanes; ++lane) {
        Acc* to = out + ((group + lane) * shape.out_features + p) * features;
        for (int d = 0; d < features; ++d) to[d] += from[d * kLanes + lane];
      }
    }
  });
}

}  // namespace fastunlearn
