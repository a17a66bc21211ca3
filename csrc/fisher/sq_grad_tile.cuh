// The main loop of the squared per-sample gradient, for any operand that can say where an element
// lies.
//
// A block keeps two register tiles: the running product of one sample and the sum of squares over
// samples. At a sample's end the product is squared into the sum, so nothing of size N x P x D ever
// exists.
#pragma once

#include "common/block_sum.h"
#include "common/scalar.cuh"
#include "common/tile_loader.cuh"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

static_assert(kTileDepth == kSumBlock, "with one position per sample a tile is a block of samples");

// kPointwise: one position per sample, where (g a)^2 needs no running product; the depth of a tile
// then runs over samples instead of leaving 15 of its 16 rows empty.
template <bool kPointwise, typename Acc, typename GradOperand, typename InputOperand>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<Acc>)
    sq_grad_kernel(GradOperand grad, InputOperand input, SqGradShape shape, SqGradPlan plan,
                   Acc* out) {
  __shared__ OperandTile<Acc> grads;
  __shared__ OperandTile<Acc> inputs;

  // blockIdx.x = ((split * groups + group) * tiles_out + tile_out) * tiles_in + tile_in
  int64_t block = blockIdx.x;
  const int64_t first_in = block % plan.tiles_in * kTileIn;
  block /= plan.tiles_in;
  const int64_t first_out = block % plan.tiles_out * kTileOut;
  block /= plan.tiles_out;
  const int64_t group = block % shape.groups;
  const int64_t split = block / shape.groups;
  const int64_t first_sample = split * plan.samples_per_split;
  const int64_t last_sample = first_sample + plan.samples_per_split < shape.samples
                                  ? first_sample + plan.samples_per_split
                                  : shape.samples;

  const TileLoader<GradOperand> grad_loader(grad, group, first_out);
  const TileLoader<InputOperand> input_loader(input, group, first_in);
  // Strided ownership (p = row + 16 i, d = column + 16 j): a warp reads consecutive shared words.
  constexpr int kColumns = kTileIn / kThreadIn;
  constexpr int kRows = kTileOut / kThreadOut;
  const int column = threadIdx.x % kColumns;
  const int row = threadIdx.x / kColumns;

  Acc product[kThreadOut][kThreadIn] = {};
  Acc squares[kThreadOut][kThreadIn] = {};  // of a block of samples
  Acc total[kThreadOut][kThreadIn] = {};    // of all blocks before
  auto end_block = [&] {
#pragma unroll
    for (int i = 0; i < kThreadOut; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadIn; ++j) {
        total[i][j] += squares[i][j];
        squares[i][j] = 0;
      }
    }
  };

  auto multiply_tiles = [&] {
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k) {
      Acc g[kThreadOut], a[kThreadIn];
#pragma unroll
      for (int i = 0; i < kThreadOut; ++i) g[i] = grads[k][row + kRows * i];
#pragma unroll
      for (int j = 0; j < kThreadIn; ++j) a[j] = inputs[k][column + kColumns * j];
#pragma unroll
      for (int i = 0; i < kThreadOut; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadIn; ++j) {
          if constexpr (kPointwise) {
            const Acc value = g[i] * a[j];
            squares[i][j] += value * value;
          } else {
            product[i][j] += g[i] * a[j];
          }
        }
      }
    }
  };
  // The depth of one tile: positions [t, t + kTileDepth) of a sample, or that many samples.
  auto step = [&](int64_t sample, int64_t t) {
    auto at = [&](const auto& operand) {
      return [&](int k) {
        return kPointwise ? operand.position(group, sample + k, 0, last_sample)
                          : operand.position(group, sample, t + k, last_sample);
      };
    };
    grad_loader.template load<Acc>(grads, grad, at(grad));
    input_loader.template load<Acc>(inputs, input, at(input));
    __syncthreads();
    multiply_tiles();
    __syncthreads();
  };

  if constexpr (kPointwise) {
    for (int64_t n = first_sample; n < last_sample; n += kTileDepth) {
      step(n, 0);
      end_block();
    }
  } else {
    for (int64_t n = first_sample; n < last_sample; ++n) {
      for (int64_t t = 0; t < shape.positions; t += kTileDepth) step(n, t);
#pragma unroll
      for (int i = 0; i < kThreadOut; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadIn; ++j) {
          squares[i][j] += product[i][j] * product[i][j];
          product[i][j] = 0;
        }
      }
      if ((n - first_sample) % kSumBlock == kSumBlock - 1) end_block();
    }
    end_block();
  }

  // With one split `out` is the result [groups, P, D]; with more it is the workspace [splits,
  // groups, P, D], which nobody has written yet.
  const bool accumulate = plan.splits == 1;
#pragma unroll
  for (int i = 0; i < kThreadOut; ++i) {
    const int64_t p = first_out + row + kRows * i;
    if (p >= shape.out_features) continue;
#pragma unroll
    for (int j = 0; j < kThreadIn; ++j) {
      const int64_t d = first_in + column + kColumns * j;
      if (d >= shape.in_features) continue;
      Acc* target =
          out + ((split * shape.groups + group) * shape.out_features + p) * shape.in_features + d;
      *target = accumulate ? *target + total[i][j] : total[i][j];
    }
  }
}

}  // namespace
}  // namespace fastunlearn
