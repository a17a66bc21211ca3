// The Gram matrix of the patches of a convolution (implicit im2col) on CUDA.
//
// A block owns one tile on or above the diagonal and a split of the patches. It multiplies in
// registers, adds up chains of kGramChain products, and adds those to the tile in memory, and to
// its mirror image, every kGramFlush patches.
#pragma once

#include "common/patch_operand.cuh"
#include "common/tile_loader.cuh"
#include "subspace/gram_conv2d.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// The patches, each times the weight of its image.
template <typename Scalar>
struct WeightedPatchOperand {
  static constexpr bool kPositionsContiguous = true;
  using Patches = PatchOperand<Scalar>;
  using Feature = typename Patches::Feature;
  struct Position {
    typename Patches::Position patch;
    Accumulator<Scalar> weight;
  };

  Patches patches;

  __device__ __forceinline__ Feature feature(int64_t group, int64_t index) const {
    return patches.feature(group, index);
  }
  __device__ __forceinline__ Accumulator<Scalar> load(const Feature& tap,
                                                      const Position& at) const {
    return patches.load(tap, at.patch) * at.weight;
  }
};

// weights: one per sample, or null for 1. With one split `out` is the result [G, D, D]; with more
// it is the workspace [splits, G, D, D], which nobody has written yet.
template <typename Scalar, typename Master>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<Accumulator<Scalar>>)
    gram_conv2d_kernel(PatchOperand<Scalar> patches, const Accumulator<Scalar>* weights,
                       GramShape shape, GramPlan plan, Master* out) {
  using Acc = Accumulator<Scalar>;
  __shared__ OperandTile<Acc> left;
  __shared__ OperandTile<Acc> right;

  // blockIdx.x = (split * groups + group) * tiles + tile
  int64_t block = blockIdx.x;
  const TileIndex tile = upper_tile(block % plan.tiles);
  block /= plan.tiles;
  const int64_t group = block % shape.groups;
  const int64_t split = block / shape.groups;
  const int64_t first_row = tile.row * kTileOut;
  const int64_t first_column = tile.column * kTileIn;

  const WeightedPatchOperand<Scalar> weighted{patches};
  const TileLoader<WeightedPatchOperand<Scalar>> left_loader(weighted, group, first_row);
  const TileLoader<PatchOperand<Scalar>> right_loader(patches, group, first_column);
  // Strided ownership as in every tile here: a warp reads consecutive shared words.
  constexpr int kColumns = kTileIn / kThreadIn;
  constexpr int kRows = kTileOut / kThreadOut;
  const int column = threadIdx.x % kColumns;
  const int row = threadIdx.x / kColumns;

  Acc chain[kThreadOut][kThreadIn] = {};
  Acc total[kThreadOut][kThreadIn] = {};  // of all chains since the last flush
  auto end_chain = [&] {
#pragma unroll
    for (int i = 0; i < kThreadOut; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadIn; ++j) {
        total[i][j] += chain[i][j];
        chain[i][j] = 0;
      }
    }
  };
  const int64_t first = split * plan.patches_per_split;
  const int64_t patch_count = shape.samples * shape.positions;
  const int64_t last =
      first + plan.patches_per_split < patch_count ? first + plan.patches_per_split : patch_count;
  const int positions = static_cast<int>(shape.positions);
  // A thread loads one patch of a step; both operands need the same one.
  int64_t at = first + threadIdx.x % kTileDepth;
  int64_t sample = at / positions;
  int position = static_cast<int>(at % positions);
  auto step = [&] {
    const bool inside = at < last;
    const auto patch =
        patches.position(group, inside ? sample : shape.samples, position, shape.samples);
    const Acc weight = weights != nullptr && inside ? weights[sample] : Acc(1);
    left_loader.template load<Acc>(left, weighted, [&](int) {
      return typename WeightedPatchOperand<Scalar>::Position{patch, weight};
    });
    right_loader.template load<Acc>(right, patches, [&](int) { return patch; });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k) {
      Acc a[kThreadOut], b[kThreadIn];
#pragma unroll
      for (int i = 0; i < kThreadOut; ++i) a[i] = left[k][row + kRows * i];
#pragma unroll
      for (int j = 0; j < kThreadIn; ++j) b[j] = right[k][column + kColumns * j];
#pragma unroll
      for (int i = 0; i < kThreadOut; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadIn; ++j) chain[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
    at += kTileDepth;
    position += kTileDepth;
    sample += position / positions;
    position %= positions;
  };

  Master* target = out + (split * shape.groups + group) * shape.features * shape.features;
  bool written = plan.splits == 1;  // whether the target holds a sum already
  for (int64_t m = first; m < last;) {
    const int64_t end = m + kGramFlush < last ? m + kGramFlush : last;
    while (m < end) {
      const int64_t chain_end = m + kGramChain < end ? m + kGramChain : end;
      for (; m < chain_end; m += kTileDepth) step();
      end_chain();
    }
#pragma unroll
    for (int i = 0; i < kThreadOut; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadIn; ++j) {
        const int64_t p = first_row + row + kRows * i;
        const int64_t d = first_column + column + kColumns * j;
        if (p <= d && d < shape.features) {
          Master* upper = target + p * shape.features + d;
          Master* lower = target + d * shape.features + p;
          *upper = (written ? *upper : 0) + total[i][j];
          if (p < d) *lower = (written ? *lower : 0) + total[i][j];
        }
        total[i][j] = 0;
      }
    }
    written = true;
  }
}

}  // namespace
}  // namespace fastunlearn
