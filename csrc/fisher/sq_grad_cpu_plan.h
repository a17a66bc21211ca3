// How the squared per-sample gradient is cut on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/block_sum.h"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {

inline constexpr int kSquareRows = 6;  // 6 x 2 products and squares: 24 of AVX-512's 32 registers
inline constexpr int kSquareLaneBytes = 128;  // two AVX-512 registers

// A task owns at most kSquareSubtiles x kSquarePanels register tiles, whose sums it keeps in its
// cache.
inline constexpr int kSquareSubtiles = 8;
inline constexpr int kSquarePanels = 4;

// Positions that a block of samples should fill: with few positions a sample, several samples pass
// through the registers before their squares are added to the tile.
inline constexpr int kBlockPositions = 128;
// Packed numbers of one chunk of samples, for all threads: part of the L3 cache. One block of
// samples is never cut, however large.
inline constexpr int64_t kChunkBytes = int64_t{4} << 20;
// Sums of squares are taken over blocks, chunks of blocks and all chunks: a rounding error that
// grows with kSumBlock + kSumBlock + N / kChunkSamples.
inline constexpr int64_t kChunkSamples = int64_t{kSumBlock} * kSumBlock;

// Rows and lanes are the features of the two factors, per group.
struct SqGradCpuPlan {
  int64_t row_tiles = 0, lane_tiles = 0;                   // tasks per group
  int subtiles = kSquareSubtiles, panels = kSquarePanels;  // register tiles of one task
  int64_t chunk = 0;                                       // samples packed at once
  int block = 0;                                           // samples between additions to a tile
};

// Only `chunk` and `block` change the order in which one weight's squares are summed; they do not
// depend on the number of threads.
inline SqGradCpuPlan plan_sq_grad_cpu(const SqGradShape& shape, int64_t rows, int64_t lanes,
                                      int64_t packed_per_sample, int64_t element_bytes,
                                      int64_t threads) {
  SqGradCpuPlan plan;
  const int64_t all_subtiles = ceil_div(rows, kSquareRows);
  const int64_t all_panels = ceil_div(lanes * element_bytes, kSquareLaneBytes);
  auto tasks = [&] {
    plan.row_tiles = ceil_div(all_subtiles, plan.subtiles);
    plan.lane_tiles = ceil_div(all_panels, plan.panels);
    return shape.groups * plan.row_tiles * plan.lane_tiles;
  };
  // Four tasks a thread even out cores of unequal speed.
  while (tasks() < 4 * threads && plan.subtiles * plan.panels > 1)
    (plan.subtiles > plan.panels ? plan.subtiles : plan.panels) /= 2;
  plan.block =
      static_cast<int>(std::clamp<int64_t>(kBlockPositions / shape.positions, 1, kSumBlock));
  const int64_t fit =
      std::min(kChunkBytes / (packed_per_sample * element_bytes + 1), kChunkSamples);
  const int64_t blocks =
      std::clamp<int64_t>(fit / plan.block, 1, ceil_div(shape.samples, plan.block));
  plan.chunk = blocks * plan.block;
  return plan;
}

}  // namespace fastunlearn
