// Tiles of a factor of a product, copied to shared memory.
//
// An operand describes one factor, a matrix [positions, features] per (group, sample):
//   Feature feature(group, index)         where a feature lies, computed once per thread
//   Position position(group, sample, t)   where a position lies, computed once per step
//   load(Feature, Position)               the element, 0 outside
//   kPositionsContiguous                  which of the two runs through consecutive addresses
#pragma once

#include <cuda_runtime.h>

#include "common/tile.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// +1 keeps the writes of an operand with contiguous positions free of bank conflicts.
template <typename Acc>
using OperandTile = Acc[kTileDepth][kTileOut + 1];
static_assert(kTileOut == kTileIn, "both operands share one tile type");

// Copies tiles of one operand to shared memory, consecutive threads along the contiguous axis.
template <typename Operand>
struct TileLoader {
  static constexpr bool kAlongPositions = Operand::kPositionsContiguous;
  static constexpr int kSpan = kAlongPositions ? kTileDepth : kTileOut;
  static constexpr int kRows = kTileThreads / kSpan;
  static constexpr int kSteps = (kAlongPositions ? kTileOut : kTileDepth) / kRows;
  static constexpr int kFeatures = kAlongPositions ? kSteps : 1;
  static_assert(kTileThreads % kSpan == 0 && kSteps * kRows * kSpan == kTileDepth * kTileOut);

  typename Operand::Feature features[kFeatures];

  __device__ __forceinline__ TileLoader(const Operand& operand, int64_t group, int64_t first) {
#pragma unroll
    for (int i = 0; i < kFeatures; ++i)
      features[i] = operand.feature(group, first + feature_row(i));
  }

  __device__ __forceinline__ int feature_row(int i) const {
    return kAlongPositions ? threadIdx.x / kSpan + i * kRows : threadIdx.x % kSpan;
  }

  // depth(k) -> Position of row k of the tile.
  template <typename Acc, typename Depth>
  __device__ __forceinline__ void load(OperandTile<Acc>& tile, const Operand& operand,
                                       Depth depth) const {
    if constexpr (kAlongPositions) {
      const int k = threadIdx.x % kSpan;
      const auto position = depth(k);
#pragma unroll
      for (int i = 0; i < kFeatures; ++i) {
        tile[k][feature_row(i)] = operand.load(features[i], position);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int k = threadIdx.x / kSpan + i * kRows;
        tile[k][feature_row(0)] = operand.load(features[0], depth(k));
      }
    }
  }
};

// Blocks per multiprocessor: 2 gives a thread 128 registers, 1 gives float64 its 255. Left to
// itself, ptxas takes 64 and spills.
template <typename Acc>
inline constexpr int kTileBlocks = sizeof(Acc) == 8 ? 1 : 2;

}  // namespace
}  // namespace fastunlearn
