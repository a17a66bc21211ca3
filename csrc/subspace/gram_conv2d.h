// gram[G, D, D] += sum over patches m of weight[n(m)] * patch[g, m, :]^T patch[g, m, :]
//
// The product is symmetric: only tiles on and above the diagonal are computed, and what they hold
// is added on both sides of it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "common/tile.h"

namespace fastunlearn {

// Patches whose sum is kept in the type of the products (fp32 for fp32 and half images) before it
// is added to the Gram matrix, which may be float64.
inline constexpr int kGramFlush = 4096;
// Terms in one chain of additions; sums of chains are added up, so that rounding errors grow with
// kGramChain + kGramFlush / kGramChain.
inline constexpr int kGramChain = 64;
static_assert(kTileOut == kTileIn && kGramChain % kTileDepth == 0 && kGramFlush % kGramChain == 0);

struct GramShape {
  int64_t groups = 1;
  int64_t features = 0;  // D, per group
  int64_t samples = 0;
  int64_t positions = 0;  // per sample
};

struct GramPlan {
  int64_t tiles = 0;              // on and above the diagonal of one group
  int64_t splits = 1;             // parts of the patches, summed in order afterwards
  int64_t patches_per_split = 0;  // the last split may have fewer
  int64_t blocks = 0;
};

// Tiles on and above the diagonal of a matrix of `side` x `side` tiles.
inline int64_t upper_tiles(int64_t side) { return side * (side + 1) / 2; }

struct TileIndex {
  int64_t row, column;
};

// The index-th tile on or above the diagonal, column by column: (0, 0), (0, 1), (1, 1), (0, 2), ...
FASTUNLEARN_HOST_DEVICE TileIndex upper_tile(int64_t index) {
  int64_t column = 0;
  while (index > column) index -= ++column;
  return {index, column};
}

// Splits the patches only as far as the tiles leave the GPU idle: two blocks per multiprocessor
// hide latency. At most 16 splits, so that the workspace stays a small multiple of the Gram matrix
// however many images there are, and none shorter than kGramFlush / 16 patches.
inline GramPlan plan_gram_conv2d(const GramShape& shape, int64_t multiprocessors) {
  GramPlan plan;
  plan.tiles = upper_tiles(ceil_div(shape.features, kTileIn));
  const int64_t tiles = shape.groups * plan.tiles;
  const int64_t patches = shape.samples * shape.positions;
  if (tiles == 0 || patches == 0) return plan;
  constexpr int64_t kShortest = kGramFlush / 16;
  const int64_t wanted = std::clamp<int64_t>(2 * multiprocessors / tiles, 1, 16);
  plan.patches_per_split = ceil_div(ceil_div(patches, wanted), kShortest) * kShortest;
  plan.splits = ceil_div(patches, plan.patches_per_split);
  plan.blocks = tiles * plan.splits;
  return plan;
}

}  // namespace fastunlearn
