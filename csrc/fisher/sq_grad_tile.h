// How the sum of squared products is cut up, and which kernel does it: the part shared by Linear
// and Conv2d.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tile.h"

namespace fastunlearn {

// The sizes of  out[g, p, d] += sum_n (sum_t grad[g, n, t, p] * input[g, n, t, d])^2.
struct SqGradShape {
  int64_t groups = 1;
  int64_t samples = 0;
  int64_t positions = 0;
  int64_t out_features = 0;  // per group
  int64_t in_features = 0;   // per group
};

enum class SqGradKernel {
  kSimt,       // fp32 and fp64, tiles of 64 x 64
  kPointwise,  // one position per sample: the same tiles, their depth along the samples
  kDirect,     // few outputs per group: a warp for 16 of them, no tile
  kMma,        // tensor cores, tiles of 64 x 64
  kMmaTall,    // tensor cores, tiles of 128 output x 64 input features
  kMmaWide,    // tensor cores, tiles of 128 x 128
};

// ---- the tiles of the tensor-core kernels

// kOut x kIn outputs per block, in fragments of 16 x 8 per warp.
template <int kOut_, int kIn_, int kWarpsOut_, int kWarpsIn_, int kBlocks_>
struct SqGradMmaTile {
  static constexpr int kOut = kOut_, kIn = kIn_;
  static constexpr int kWarpsOut = kWarpsOut_, kWarpsIn = kWarpsIn_;
  static constexpr int kThreads = 32 * kWarpsOut * kWarpsIn;
  static constexpr int kBlocks = kBlocks_;  // per multiprocessor; more registers than this leaves
                                            // would go unused
  static constexpr int kStages = 3;         // of copies in flight and in use
  static constexpr int kRunBytes = 64;      // of positions of one feature per stage
  static constexpr int kFragmentsOut = kOut / kWarpsOut / 16;
  static constexpr int kFragmentsIn = kIn / kWarpsIn / 8;
  static_assert(kFragmentsOut > 0 && kFragmentsIn % 2 == 0);

  // A stage of both operands, rows padded so that eight of them fall on different banks: by eight
  // features, or, with contiguous positions, by 16 bytes. The squares of earlier blocks of samples.
  // Where each input feature lies, for patches.
  static constexpr int kOperandBytes(int features, bool positions_contiguous) {
    return positions_contiguous ? features * (kRunBytes + 16) : kRunBytes * (features + 8);
  }
  static constexpr int kSharedBytes(bool positions_contiguous) {
    return kStages * (kOperandBytes(kOut, positions_contiguous) +
                      kOperandBytes(kIn, positions_contiguous)) +
           kOut * kIn * 4 + (positions_contiguous ? kIn * 16 : 0);
  }
};
using SqGradMma = SqGradMmaTile<64, 64, 2, 2, 3>;
using SqGradMmaTall = SqGradMmaTile<128, 64, 4, 2, 2>;
using SqGradMmaWide = SqGradMmaTile<128, 128, 2, 4, 1>;
static_assert(SqGradMma::kSharedBytes(true) <= 48 * 1024, "what every GPU gives without asking");

// ---- the direct kernel

inline constexpr int kDirectThreads = 256;
inline constexpr int kDirectFeatures = 16;  // input features of one output feature per warp

// Up to here one warp per 16 outputs takes fewer instructions than the tile of tensor cores that
// the group would have: 32 positions cost 40 per 16 outputs, and 300 for the 64 x 64 tile with its
// gathered patches, however few of its 4,096 outputs there are. Counted, not measured.
inline constexpr int64_t kDirectOutputs = 128;

// ---- the plan

struct SqGradDevice {
  int64_t multiprocessors = 1;
  int64_t max_shared_bytes = 48 * 1024;  // that a block may ask for
};

struct SqGradPlan {
  SqGradKernel kernel = SqGradKernel::kSimt;
  int64_t tiles_out = 0;
  int64_t tiles_in = 0;
  int64_t splits = 1;             // parts of the samples, summed in order afterwards
  int64_t samples_per_split = 0;  // the last split may have fewer
  int64_t blocks = 0;
};

// tensor_cores: the inputs have 16 bits, or are fp32 and may be rounded to TF32.
inline SqGradKernel choose_sq_grad_kernel(const SqGradShape& shape, bool convolution,
                                          bool tensor_cores, const SqGradDevice& device) {
  // sum_n (g a)^2 is the product of g^2 and a^2, and squares of 16-bit numbers do not fit into 16
  // bits: fp32 on the ordinary cores. It is bound by `out` anyway unless there are many samples.
  if (shape.positions == 1) return SqGradKernel::kPointwise;
  if (convolution && shape.out_features * shape.in_features <= kDirectOutputs)
    return SqGradKernel::kDirect;
  if (!tensor_cores) return SqGradKernel::kSimt;
  if (convolution) {
    // Patches are bound by their gathering, and a tall tile gathers them once for twice the
    // outputs.
    const bool tall = shape.out_features > SqGradMma::kOut &&
                      SqGradMmaTall::kSharedBytes(true) <= device.max_shared_bytes;
    return tall ? SqGradKernel::kMmaTall : SqGradKernel::kMma;
  }
  // The wide tile reads half as many bytes per product. One block fills a multiprocessor, so fewer
  // than two per multiprocessor would leave too many idle in the last round.
  using Wide = SqGradMmaWide;
  const int64_t wide =
      ceil_div(shape.out_features, Wide::kOut) * ceil_div(shape.in_features, Wide::kIn);
  if (wide >= 2 * device.multiprocessors && Wide::kSharedBytes(false) <= device.max_shared_bytes) {
    return SqGradKernel::kMmaWide;
  }
  return SqGradKernel::kMma;
}

// Splits the samples only as far as the tiles leave the GPU idle: eight warps, sixteen or more in
// small blocks, per multiprocessor are enough to hide latency, and every split costs one more write
// and read of `out`. At most 16 splits, so that the workspace stays a small multiple of the weight
// and never grows with the number of samples.
inline SqGradPlan plan_sq_grad(const SqGradShape& shape, bool convolution, bool tensor_cores,
                               const SqGradDevice& device) {
  SqGradPlan plan;
  plan.kernel = choose_sq_grad_kernel(shape, convolution, tensor_cores, device);
  int64_t per_block = 1;  // tiles of a block
  int64_t wanted = 2;     // blocks per multiprocessor
  auto use = [&]<typename Tile>(Tile) {
    plan.tiles_out = ceil_div(shape.out_features, Tile::kOut);
    plan.tiles_in = ceil_div(shape.in_features, Tile::kIn);
    wanted = Tile::kBlocks;
  };
  if (plan.kernel == SqGradKernel::kDirect) {
    plan.tiles_out = shape.out_features;
    plan.tiles_in = ceil_div(shape.in_features, kDirectFeatures);
    per_block = kDirectThreads / 32;
    wanted = 4;
  } else if (plan.kernel == SqGradKernel::kMmaWide) {
    use(SqGradMmaWide{});
  } else if (plan.kernel == SqGradKernel::kMmaTall) {
    use(SqGradMmaTall{});
  } else if (plan.kernel == SqGradKernel::kMma) {
    use(SqGradMma{});
  } else {
    plan.tiles_out = ceil_div(shape.out_features, kTileOut);
    plan.tiles_in = ceil_div(shape.in_features, kTileIn);
  }
  const int64_t tiles = shape.groups * plan.tiles_out * plan.tiles_in;
  if (tiles == 0 || shape.samples == 0) return plan;
  const int64_t splits =
      std::clamp<int64_t>(wanted * per_block * device.multiprocessors / tiles, 1, 16);
  plan.samples_per_split = ceil_div(shape.samples, std::min(splits, shape.samples));
  plan.splits = ceil_div(shape.samples, plan.samples_per_split);
  plan.blocks = ceil_div(tiles * plan.splits, per_block);
  return plan;
}

}  // namespace fastunlearn
