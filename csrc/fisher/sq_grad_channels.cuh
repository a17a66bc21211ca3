// Norm weights and biases: one read of the gradient (and of the normalized input), sums in a fixed
// order.
#pragma once

#include "common/block_sum.h"
#include "common/reduce.cuh"
#include "common/scalar.cuh"
#include "fisher/sq_grad_channels.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

template <bool kWithNormalized, typename Scalar>
__device__ __forceinline__ Accumulator<Scalar> channel_term(const Scalar* grad,
                                                            const Scalar* normalized, int64_t at) {
  const Accumulator<Scalar> g = widen(grad[at]);
  if constexpr (kWithNormalized) {
    return g * widen(normalized[at]);
  } else {
    return g;
  }
}

// out: the result [C] with one split, else the workspace [splits, C].
template <typename Acc>
__device__ __forceinline__ void store_split(Acc* out, const SqGradChannelsPlan& plan, int64_t split,
                                            int64_t channels, int64_t channel, Acc squares) {
  Acc* target = out + split * channels + channel;
  *target = plan.splits == 1 ? *target + squares : squares;
}

// [N, T, C]: lanes run along the channels, the block's warps share a sample's positions.
template <bool kWithNormalized, typename Scalar>
__global__ void __launch_bounds__(kChannelLanes* kChannelRows)
    sq_grad_channels_last_kernel(const Scalar* grad, const Scalar* normalized,
                                 SqGradChannelsShape shape, SqGradChannelsPlan plan,
                                 Accumulator<Scalar>* out) {
  using Acc = Accumulator<Scalar>;
  __shared__ Acc partial[kChannelRows][kChannelLanes];
  const int lane = threadIdx.x % kChannelLanes;
  const int row = threadIdx.x / kChannelLanes;
  const int64_t channel = blockIdx.x % plan.tiles * kChannelLanes + lane;
  const int64_t split = blockIdx.x / plan.tiles;
  const bool inside = channel < shape.channels;

  BlockSum<Acc> squares;
  for (int64_t i = 0; i < plan.samples_per_split; ++i) {
    const int64_t sample = split * plan.samples_per_split + i;
    if (sample >= shape.samples) break;  // the same for the whole block
    BlockSum<Acc> positions;
    for (int64_t t = row; inside && t < shape.outer; t += kChannelRows) {
      positions.add(channel_term<kWithNormalized>(
          grad, normalized, (sample * shape.outer + t) * shape.channels + channel));
    }
    Acc sum = positions.value();
    partial[row][lane] = sum;
    __syncthreads();
    if (row == 0) {
#pragma unroll
      for (int r = 1; r < kChannelRows; ++r) sum += partial[r][lane];
      squares.add(sum * sum);
    }
    __syncthreads();
  }
  if (row == 0 && inside) store_split(out, plan, split, shape.channels, channel, squares.value());
}

// [N, T, C, S]: a warp owns one channel and runs along S.
template <bool kWithNormalized, typename Scalar>
__global__ void __launch_bounds__(kChannelLanes* kChannelRows)
    sq_grad_channels_inner_kernel(const Scalar* grad, const Scalar* normalized,
                                  SqGradChannelsShape shape, SqGradChannelsPlan plan,
                                  Accumulator<Scalar>* out) {
  using Acc = Accumulator<Scalar>;
  const int lane = threadIdx.x % kChannelLanes;
  const int64_t channel = blockIdx.x % plan.tiles * kChannelRows + threadIdx.x / kChannelLanes;
  const int64_t split = blockIdx.x / plan.tiles;
  if (channel >= shape.channels) return;  // a whole warp

  BlockSum<Acc> squares;
  for (int64_t i = 0; i < plan.samples_per_split; ++i) {
    const int64_t sample = split * plan.samples_per_split + i;
    if (sample >= shape.samples) break;
    BlockSum<Acc> positions;
    for (int64_t t = 0; t < shape.outer; ++t) {
      const int64_t plane = ((sample * shape.outer + t) * shape.channels + channel) * shape.inner;
      for (int64_t s = lane; s < shape.inner; s += kChannelLanes) {
        positions.add(channel_term<kWithNormalized>(grad, normalized, plane + s));
      }
    }
    const Acc sum = warp_sum(positions.value());
    squares.add(sum * sum);
  }
  if (lane == 0) store_split(out, plan, split, shape.channels, channel, squares.value());
}

}  // namespace
}  // namespace fastunlearn
