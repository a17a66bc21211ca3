// out[c] += sum_n (sum_t grad[n, t, c, s] * normalized[n, t, c, s])^2, t and s over all other axes.
// The weight of a norm layer; without `normalized`, any bias.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fisher/sq_grad_tile.h"

namespace fastunlearn {

struct SqGradChannelsShape {
  int64_t samples = 0;
  int64_t outer = 0;  // axes between sample and channel: T of [N, T, C]
  int64_t channels = 0;
  int64_t inner = 0;  // axes behind the channel: H W of [N, C, H, W]
};

inline constexpr int kChannelLanes = 32;  // a warp side by side
inline constexpr int kChannelRows = 8;    // warps per block

struct SqGradChannelsPlan {
  int64_t tiles = 0;  // blocks along the channels
  int64_t splits = 1;
  int64_t samples_per_split = 0;
  int64_t blocks = 0;
};

// Channels last (inner = 1): a block covers 32 channels. Otherwise a warp covers one channel, a
// block eight.
inline SqGradChannelsPlan plan_sq_grad_channels(const SqGradChannelsShape& shape,
                                                int64_t multiprocessors) {
  SqGradChannelsPlan plan;
  plan.tiles = ceil_div(shape.channels, shape.inner == 1 ? kChannelLanes : kChannelRows);
  if (plan.tiles == 0 || shape.samples == 0) return plan;
  // Memory-bound: eight blocks of 256 threads fill a multiprocessor. `out` is a vector, so 256
  // splits of it are still small beside the gradients read.
  const int64_t wanted = std::clamp<int64_t>(8 * multiprocessors / plan.tiles, 1, 256);
  plan.samples_per_split = ceil_div(shape.samples, std::min(wanted, shape.samples));
  plan.splits = ceil_div(shape.samples, plan.samples_per_split);
  plan.blocks = plan.tiles * plan.splits;
  return plan;
}

}  // namespace fastunlearn
