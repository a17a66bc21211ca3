// How sq_grad_linear is cut for Hopper's warpgroup products: which shapes, which tile, which
// clusters. Pure host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "fisher/sq_grad_tile.h"

namespace fastunlearn {

// Two warpgroups multiply, each 64 output features by the tile's input features; one warp of a
// third copies.
inline constexpr int kWgmmaTileOut = 128;
inline constexpr int kWgmmaConsumers = 2;
inline constexpr int kWgmmaThreads = 128 * (kWgmmaConsumers + 1);
inline constexpr int kWgmmaPanel = 64;  // features of one copy: rows of 128 bytes

// A tile of kWgmmaTileOut x kTileIn. A warpgroup thread holds kTileIn / 2 products; as many sums of
// squares fit beside them into 240 registers up to 192 input features, but not for 256: there they
// lie in shared memory, 128 KB that leave half as many positions a stage.
template <int kTileIn>
struct WgmmaTile {
  static constexpr bool kSquaresInShared = kTileIn > 192;
  static constexpr int kStageRows = kSquaresInShared ? 32 : 64;  // positions
  static constexpr int kPanelBytes = kStageRows * 128;
  static constexpr int kGradBytes = kWgmmaTileOut / kWgmmaPanel * kPanelBytes;
  static constexpr int kInputBytes = kTileIn / kWgmmaPanel * kPanelBytes;
  static constexpr int kStageBytes = kGradBytes + kInputBytes;
  static constexpr int kSquaresBytes = kSquaresInShared ? kWgmmaTileOut * kTileIn * 4 : 0;
  static constexpr int kAlignment = 1024;  // of the 128-byte swizzle's pattern
  static constexpr int kMaxSharedBytes = 232448;
  static constexpr int kBarrierBytes = 16;  // full and empty, of one stage
  static constexpr int kStages =
      (kMaxSharedBytes - kAlignment - kSquaresBytes) / (kStageBytes + kBarrierBytes);
  static constexpr int kSharedBytes =
      kAlignment + kStages * (kStageBytes + kBarrierBytes) + kSquaresBytes;
  static_assert(kStages >= 4 && kSharedBytes <= kMaxSharedBytes);
  static_assert(kPanelBytes % (2 * kAlignment) == 0, "half a panel is whole swizzle patterns too");
};

struct SqGradWgmmaPlan {
  int32_t tile_in = 0;  // 128, 192 or 256; 0: not for this kernel
  int32_t cluster = 1;  // blocks that share their input tiles: neighbours in output features
  int64_t tiles_out = 0;
  int64_t tiles_in = 0;
  int64_t splits = 1;
  int64_t samples_per_split = 0;
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
};

// Rows of 16-byte units for the copy engine, sizes it can address. With one position per sample
// nothing is summed before squaring, and the tile kernel's pointwise loop does half the work.
inline bool is_for_wgmma(const SqGradShape& shape) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() - 256;
  const auto addressable = [](int64_t size) { return size > 0 && size <= kMax; };
  return shape.groups == 1 && shape.positions >= 2 && shape.out_features % 8 == 0 &&
         shape.in_features % 8 == 0 && addressable(shape.samples) && addressable(shape.positions) &&
         addressable(shape.out_features) && addressable(shape.in_features);
}

// Clock cycles of one block for one sample, counted, not measured. The tensor cores do 2048
// multiply-adds a cycle; shared memory moves 128 bytes a cycle, L2 about 24 for each multiprocessor
// (5.5 TB/s on 132 of them at 1.75 GHz, a figure from the literature).
template <int kTileIn>
int64_t wgmma_cycles(int64_t positions, int64_t cluster) {
  using Tile = WgmmaTile<kTileIn>;
  const int64_t steps = ceil_div(positions, 16);
  const int64_t multiply = steps * 16 * kWgmmaTileOut * kTileIn / 2048;
  const int64_t operands = steps * kWgmmaConsumers * (64 + kTileIn) * 32;
  const int64_t stages = ceil_div(positions, Tile::kStageRows) * Tile::kStageBytes;
  const int64_t l2 = positions * (kWgmmaTileOut + kTileIn / cluster) * 2 / 24;
  const int64_t square =
      Tile::kSquaresInShared ? 2 * Tile::kSquaresBytes / 128 : kWgmmaTileOut * kTileIn / 128;
  return std::max({multiply, (operands + stages) / 128, l2}) + square;
}

template <int kTileIn>
SqGradWgmmaPlan plan_wgmma_tile(const SqGradShape& shape, int64_t multiprocessors,
                                int32_t cluster) {
  SqGradWgmmaPlan plan;
  plan.tile_in = kTileIn;
  plan.cluster = cluster;
  plan.tiles_out = ceil_div(ceil_div(shape.out_features, kWgmmaTileOut), cluster) * cluster;
  plan.tiles_in = ceil_div(shape.in_features, kTileIn);
  const int64_t tiles = plan.tiles_out * plan.tiles_in;
  // One block fills a multiprocessor's shared memory. As in plan_sq_grad, at most 16 splits.
  const int64_t wanted = std::clamp<int64_t>(multiprocessors / tiles, 1, 16);
  plan.samples_per_split = ceil_div(shape.samples, std::min(wanted, shape.samples));
  plan.splits = ceil_div(shape.samples, plan.samples_per_split);
  plan.blocks = tiles * plan.splits;
  plan.shared_bytes = WgmmaTile<kTileIn>::kSharedBytes;
  return plan;
}

// The candidate of the fewest counted cycles, the smaller tile and the smaller cluster in a tie.
inline SqGradWgmmaPlan plan_sq_grad_wgmma(const SqGradShape& shape, int64_t multiprocessors) {
  SqGradWgmmaPlan best;
  if (!is_for_wgmma(shape)) return best;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  const auto consider = [&]<int kTileIn>() {
    for (int32_t cluster : {1, 2}) {
      if (cluster > ceil_div(shape.out_features, kWgmmaTileOut)) continue;  // nobody to share with
      const auto plan = plan_wgmma_tile<kTileIn>(shape, multiprocessors, cluster);
      const int64_t cycles = ceil_div(plan.blocks, multiprocessors) * plan.samples_per_split *
                             wgmma_cycles<kTileIn>(shape.positions, cluster);
      if (cycles < fewest) {
        fewest = cycles;
        best = plan;
      }
    }
  };
  consider.template operator()<128>();
  consider.template operator()<192>();
  consider.template operator()<256>();
  return best;
}

}  // namespace fastunlearn
