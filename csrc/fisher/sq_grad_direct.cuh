// The squared per-sample gradient where a group has few outputs, as in a depthwise convolution: a
// tile would be nearly empty, so each warp sums 16 outputs of its own, lanes along the positions.
#pragma once

#include "common/block_sum.h"
#include "common/scalar.cuh"
#include "common/tile_loader.cuh"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// Sums kCount values (a power of two up to 32) over the lanes of a warp, in a fixed order. Lane l
// gets the sum of values[l / (32 / kCount)]. In each of the first rounds a lane gives away the half
// of its values that it will not own: kCount - 1 + log2(32 / kCount) shuffles instead of 5 kCount.
template <int kCount, typename T>
__device__ __forceinline__ T transposed_warp_sum(T (&values)[kCount]) {
  static_assert(kCount >= 1 && kCount <= 32 && (kCount & (kCount - 1)) == 0);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < 5; ++round) {  // constant bounds: values[] must stay in registers
    const int half = kCount >> (round + 1);
    const int offset = 16 >> round;
    const bool upper = (lane & offset) != 0;
    if (half == 0) values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= half) continue;
      const T given = upper ? values[i] : values[i + half];
      const T kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
    }
  }
  return values[0];
}

template <typename Scalar, typename GradOperand, typename InputOperand>
__global__ void __launch_bounds__(kDirectThreads, kTileBlocks<Accumulator<Scalar>>)
    sq_grad_direct_kernel(GradOperand grad, InputOperand input, SqGradShape shape, SqGradPlan plan,
                          Accumulator<Scalar>* out) {
  using Acc = Accumulator<Scalar>;
  constexpr int kWarps = kDirectThreads / 32;
  // warp = ((split * groups + group) * tiles_out + output feature) * tiles_in + tile_in
  int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first_in = warp % plan.tiles_in * kDirectFeatures;
  warp /= plan.tiles_in;
  const int64_t p = warp % plan.tiles_out;
  warp /= plan.tiles_out;
  const int64_t group = warp % shape.groups;
  const int64_t split = warp / shape.groups;
  if (split >= plan.splits) return;  // the last block's spare warps
  const int64_t first_sample = split * plan.samples_per_split;
  const int64_t last_sample = first_sample + plan.samples_per_split < shape.samples
                                  ? first_sample + plan.samples_per_split
                                  : shape.samples;

  const int lane = threadIdx.x % 32;
  const auto plane = grad.feature(group, p);
  typename InputOperand::Feature features[kDirectFeatures];
#pragma unroll
  for (int i = 0; i < kDirectFeatures; ++i) features[i] = input.feature(group, first_in + i);
  const int64_t left = shape.in_features - first_in;
  const int count = left < kDirectFeatures ? static_cast<int>(left) : kDirectFeatures;

  BlockSum<Acc> squares;  // of feature first_in + lane / 2
  for (int64_t n = first_sample; n < last_sample; ++n) {
    Acc product[kDirectFeatures] = {};
    for (int64_t t = lane; t < shape.positions; t += 32) {
      const Acc g = grad.load(plane, grad.position(group, n, t, last_sample));
      const auto position = input.position(group, n, t, last_sample);
#pragma unroll
      for (int i = 0; i < kDirectFeatures; ++i) {
        if (i < count) product[i] += g * input.load(features[i], position);
      }
    }
    const Acc value = transposed_warp_sum(product);
    squares.add(value * value);
  }

  const int own = lane / (32 / kDirectFeatures);
  if (lane % (32 / kDirectFeatures) != 0 || own >= count) return;
  Acc* target = out +
                ((split * shape.groups + group) * shape.out_features + p) * shape.in_features +
                first_in + own;
  *target = plan.splits == 1 ? *target + squares.value() : squares.value();
}

}  // namespace
}  // namespace fastunlearn
