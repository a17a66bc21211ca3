// The squared per-sample gradient on tensor cores: bf16, fp16, and fp32 rounded to TF32.
//
// As in sq_grad_tile.cuh a block keeps the running product of one sample and the sum of squares,
// here in the registers of mma fragments. Stages of both operands stream through shared memory, in
// the order of samples and positions; a stage never holds positions of two samples, since what lies
// beyond a sample's last position is zero. The sums of earlier blocks of samples are in shared
// memory, each thread's own: a third register tile would cost the wide tile its registers.
#pragma once

#include "common/block_sum.h"
#include "common/mma.cuh"
#include "common/patch_operand.cuh"
#include "common/run_operand.cuh"
#include "common/scalar.cuh"
#include "common/shared_memory.cuh"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// One operand's share of a stage: [depth, features] or, with contiguous positions, [features,
// depth], as in memory.
template <typename Tile, typename Scalar_, bool kPositionsContiguous_, int kFeatures_>
struct MmaStage {
  using Scalar = Scalar_;
  static constexpr bool kPositionsContiguous = kPositionsContiguous_;
  static constexpr int kFeatures = kFeatures_;
  static constexpr int kDepth = Tile::kRunBytes / sizeof(Scalar);
  static constexpr int kRun = 16 / sizeof(Scalar);  // elements of 16 bytes
  static constexpr int kRows = kPositionsContiguous ? kFeatures : kDepth;
  static constexpr int kColumns = kPositionsContiguous ? kDepth : kFeatures;
  static constexpr int kPitch = kColumns + (kPositionsContiguous ? kRun : 8);
  static constexpr int kBytes = kRows * kPitch * static_cast<int>(sizeof(Scalar));
  static_assert(kBytes == Tile::kOperandBytes(kFeatures, kPositionsContiguous) && kBytes % 16 == 0);

  __device__ static __forceinline__ int at(int feature, int k) {
    return kPositionsContiguous ? feature * kPitch + k : k * kPitch + feature;
  }
};

// ---- fragments: rows of `a` are output features, columns of `b` input features

template <typename Stage>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const typename Stage::Scalar* stage,
                                       int feature, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(typename Stage::Scalar) == 4) {
    const int group = lane / 4, member = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = to_tf32(stage[Stage::at(feature + group + i % 2 * 8, k + member + i / 2 * 4)]);
  } else {
    // Matrices in the order of a[]: features 0 and 8 of the first eight positions, then of the
    // last.
    const int major = lane / 16 * 8, minor = lane / 8 % 2 * 8, row = lane % 8;
    if constexpr (Stage::kPositionsContiguous) {
      ldmatrix_x4(a, stage + Stage::at(feature + minor + row, k + major));
    } else {
      ldmatrix_x4_trans(a, stage + Stage::at(feature + minor, k + major + row));
    }
  }
}

// Two fragments, of features `feature` to feature + 15.
template <typename Stage>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const typename Stage::Scalar* stage,
                                       int feature, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(typename Stage::Scalar) == 4) {
    const int group = lane / 4, member = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b[i / 2][i % 2] =
          to_tf32(stage[Stage::at(feature + group + i / 2 * 8, k + member + i % 2 * 4)]);
  } else {
    // Matrices: both halves of the positions for the first eight features, then for the last.
    const int major = lane / 16 * 8, minor = lane / 8 % 2 * 8, row = lane % 8;
    uint32_t r[4];
    if constexpr (Stage::kPositionsContiguous) {
      ldmatrix_x4(r, stage + Stage::at(feature + major + row, k + minor));
    } else {
      ldmatrix_x4_trans(r, stage + Stage::at(feature + major, k + minor + row));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
  }
}

// ---- loaders: what one block needs of an operand, stage by stage

template <typename Tile, typename Stage, typename Operand>
struct MmaLoader;

// Runs of 16 bytes, copied asynchronously in pieces as large as the rows are aligned: 14 x 14
// planes of 16-bit elements take 8 bytes. Odd rows of those are copied element by element.
template <typename Tile, typename Stage, typename Scalar, bool kPositionsContiguous>
struct MmaLoader<Tile, Stage, RunOperand<Scalar, kPositionsContiguous>> {
  using Operand = RunOperand<Scalar, kPositionsContiguous>;
  static constexpr int kRunsPerRow = Stage::kColumns / Stage::kRun;
  static constexpr int kRuns = Stage::kRows * kRunsPerRow / Tile::kThreads;
  static_assert(kRuns * Tile::kThreads == Stage::kRows * kRunsPerRow);

  const Operand& operand;
  int64_t group, first;  // feature

  __device__ __forceinline__ MmaLoader(const Operand& operand, int64_t group, int64_t first, void*)
      : operand(operand), group(group), first(first) {}

  // The run's first `count` elements, and zeros.
  template <int kBytes>
  __device__ static __forceinline__ void copy(Scalar* to, const Scalar* from, int count) {
    constexpr int kPiece = kBytes / sizeof(Scalar);
#pragma unroll
    for (int j = 0; j < Stage::kRun; j += kPiece) {
      const int left = count - j < 0 ? 0 : count - j < kPiece ? count - j : kPiece;
      cp_async<kBytes>(to + j, left > 0 ? from + j : from, left * static_cast<int>(sizeof(Scalar)));
    }
  }

  __device__ __forceinline__ void load(Scalar* stage, int64_t sample, int64_t t) const {
    const Scalar* matrix = operand.matrix(group, sample);
    const int64_t first_row = kPositionsContiguous ? first : t;
    const int64_t first_column = kPositionsContiguous ? t : first;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int run = threadIdx.x + i * Tile::kThreads;
      const int row = run / kRunsPerRow, column = run % kRunsPerRow * Stage::kRun;
      Scalar* to = stage + row * Stage::kPitch + column;
      const int64_t left = operand.columns - first_column - column;
      int count = left < Stage::kRun ? static_cast<int>(left) : Stage::kRun;
      if (count < 0 || first_row + row >= operand.rows) count = 0;
      const Scalar* from =
          count > 0 ? matrix + (first_row + row) * operand.columns + first_column + column
                    : operand.data;
      if (operand.alignment == 16) {
        copy<16>(to, from, count);
      } else if (operand.alignment == 8) {
        copy<8>(to, from, count);
      } else if (operand.alignment == 4) {
        copy<4>(to, from, count);
      } else {
        // Loads first: they are all on their way before the first is stored.
        Scalar values[Stage::kRun];
#pragma unroll
        for (int j = 0; j < Stage::kRun; ++j)
          values[j] = j < count ? from[j] : narrow<Scalar>(0.0f);
#pragma unroll
        for (int j = 0; j < Stage::kRun; ++j) to[j] = values[j];
      }
    }
  }
};

// Patches, gathered element by element: lanes along the positions, whose taps lie side by side.
template <typename Tile, typename Stage, typename Scalar>
struct MmaLoader<Tile, Stage, PatchOperand<Scalar>> {
  using Operand = PatchOperand<Scalar>;
  using Feature = typename Operand::Feature;
  static constexpr int kRows = Tile::kThreads / Stage::kDepth;
  static constexpr int kSteps = Stage::kFeatures / kRows;
  static_assert(Stage::kPositionsContiguous && kSteps * kRows == Stage::kFeatures);
  static_assert(sizeof(Feature) <= 16);

  const Operand& operand;
  int64_t group;
  const Feature* features;  // shared: 16 per thread would be 48 registers

  __device__ __forceinline__ MmaLoader(const Operand& operand, int64_t group, int64_t first,
                                       void* table)
      : operand(operand), group(group), features(static_cast<Feature*>(table)) {
    for (int i = threadIdx.x; i < Stage::kFeatures; i += Tile::kThreads)
      static_cast<Feature*>(table)[i] = operand.feature(group, first + i);
    __syncthreads();
  }

  __device__ __forceinline__ void load(Scalar* stage, int64_t sample, int64_t t) const {
    const int k = threadIdx.x % Stage::kDepth;
    const int row = threadIdx.x / Stage::kDepth;
    const auto position = operand.position(group, sample, t + k, sample + 1);
    Scalar values[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const Scalar* from = operand.address(features[row + i * kRows], position);
      values[i] = from != nullptr ? *from : narrow<Scalar>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) stage[Stage::at(row + i * kRows, k)] = values[i];
  }
};

// ---- the kernel

template <typename Tile, typename Scalar, typename GradOperand, typename InputOperand>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    sq_grad_mma_kernel(GradOperand grad, InputOperand input, SqGradShape shape, SqGradPlan plan,
                       float* out) {
  constexpr bool kContiguous = GradOperand::kPositionsContiguous;
  static_assert(kContiguous == InputOperand::kPositionsContiguous);
  using GradStage = MmaStage<Tile, Scalar, kContiguous, Tile::kOut>;
  using InputStage = MmaStage<Tile, Scalar, kContiguous, Tile::kIn>;
  constexpr int kDepth = GradStage::kDepth;
  constexpr int kStep = sizeof(Scalar) == 4 ? 8 : 16;  // positions of one mma
  constexpr int kM = Tile::kFragmentsOut, kN = Tile::kFragmentsIn;
  constexpr int kStageBytes = GradStage::kBytes + InputStage::kBytes;

  unsigned char* shared = dynamic_shared<unsigned char>();
  auto grads = [&](int slot) { return reinterpret_cast<Scalar*>(shared + slot * kStageBytes); };
  auto inputs = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * kStageBytes + GradStage::kBytes);
  };
  float* totals = reinterpret_cast<float*>(shared + Tile::kStages * kStageBytes);

  // blockIdx.x = ((split * groups + group) * tiles_out + tile_out) * tiles_in + tile_in
  int64_t block = blockIdx.x;
  const int64_t first_in = block % plan.tiles_in * Tile::kIn;
  block /= plan.tiles_in;
  const int64_t first_out = block % plan.tiles_out * Tile::kOut;
  block /= plan.tiles_out;
  const int64_t group = block % shape.groups;
  const int64_t split = block / shape.groups;
  const int64_t first_sample = split * plan.samples_per_split;
  const int64_t last_sample = first_sample + plan.samples_per_split < shape.samples
                                  ? first_sample + plan.samples_per_split
                                  : shape.samples;

  void* table = totals + Tile::kOut * Tile::kIn;
  const MmaLoader<Tile, GradStage, GradOperand> grad_loader(grad, group, first_out, nullptr);
  const MmaLoader<Tile, InputStage, InputOperand> input_loader(input, group, first_in, table);

  // What is loaded next; it runs kStages - 1 stages ahead of what is multiplied.
  int64_t next_sample = first_sample, next_t = 0;
  int next_slot = 0;
  auto load_next = [&] {
    if (next_sample < last_sample) {
      grad_loader.load(grads(next_slot), next_sample, next_t);
      input_loader.load(inputs(next_slot), next_sample, next_t);
      next_slot = next_slot + 1 < Tile::kStages ? next_slot + 1 : 0;
      next_t += kDepth;
      if (next_t >= shape.positions) {
        next_t = 0;
        ++next_sample;
      }
    }
    cp_async_commit();  // also an empty group, so that the count in the wait below is right
  };
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) load_next();

  const int warp = threadIdx.x / 32;
  const int warp_out = warp / Tile::kWarpsIn * (kM * 16);
  const int warp_in = warp % Tile::kWarpsIn * (kN * 8);
  float product[kM][kN][4] = {};
  float squares[kM][kN][4] = {};  // of a block of samples
  bool has_totals = false;
  auto total = [&](int i, int j, int c) -> float& {
    return totals[((i * kN + j) * 4 + c) * Tile::kThreads + threadIdx.x];
  };

  int slot = 0;
  int pending = 0;  // samples in `squares`
  for (int64_t n = first_sample; n < last_sample; ++n) {
    for (int64_t t = 0; t < shape.positions; t += kDepth) {
      cp_async_wait<Tile::kStages - 2>();
      // Everyone's copies of this stage have arrived, and everyone is done with the stage before,
      // which is loaded anew.
      __syncthreads();
      load_next();
#pragma unroll
      for (int k = 0; k < kDepth; k += kStep) {
        if (t + k >= shape.positions) break;  // zeros from here on
        uint32_t b[kN / 2][2][2];
#pragma unroll
        for (int j = 0; j < kN / 2; ++j)
          load_b<InputStage>(b[j], inputs(slot), warp_in + j * 16, k);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          uint32_t a[4];
          load_a<GradStage>(a, grads(slot), warp_out + i * 16, k);
#pragma unroll
          for (int j = 0; j < kN; ++j) {
            if constexpr (sizeof(Scalar) == 4) {
              mma_m16n8k8(product[i][j], a, b[j / 2][j % 2]);
            } else {
              mma_m16n8k16<Scalar>(product[i][j], a, b[j / 2][j % 2]);
            }
          }
        }
      }
      slot = slot + 1 < Tile::kStages ? slot + 1 : 0;
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          squares[i][j][c] += product[i][j][c] * product[i][j][c];
          product[i][j][c] = 0;
        }
      }
    }
    if (++pending == kSumBlock) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            total(i, j, c) = has_totals ? total(i, j, c) + squares[i][j][c] : squares[i][j][c];
            squares[i][j][c] = 0;
          }
        }
      }
      has_totals = true;
      pending = 0;
    }
  }

  // With one split `out` is the result [groups, P, D]; with more it is the workspace [splits,
  // groups, P, D], which nobody has written yet.
  const bool accumulate = plan.splits == 1;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t p = first_out + warp_out + i * 16 + lane / 4 + c / 2 * 8;
        const int64_t d = first_in + warp_in + j * 8 + lane % 4 * 2 + c % 2;
        if (p >= shape.out_features || d >= shape.in_features) continue;
        const float value = has_totals ? total(i, j, c) + squares[i][j][c] : squares[i][j][c];
        float* target =
            out + ((split * shape.groups + group) * shape.out_features + p) * shape.in_features + d;
        *target = accumulate ? *target + value : value;
      }
    }
  }
}

}  // namespace
}  // namespace fastunlearn
