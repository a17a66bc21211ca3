// Device code of codec_scores: sorted lines while nothing is chosen, else every pair of rows.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "codec/codec_scores.h"
#include "codec/line.h"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/shared_memory.cuh"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// ---- something chosen

// Rows j of one step: their candidates, and their distances to the block's rows i.
template <typename Scalar>
struct CodecStage {
  using Tile = CodecTile<Scalar>;
  alignas(16) Scalar features[kCodecSteps][Tile::kBlockCandidates];
  alignas(16) Scalar distances[kCodecSteps][Tile::kBlockRows];
  alignas(16) int32_t rank[kCodecSteps];
};

// 16 bytes at a time; `from` is aligned to them.
template <int kCount>
__device__ __forceinline__ void load_shared(float (&to)[kCount], const float* from) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 part = *reinterpret_cast<const float4*>(from + i);
    to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
  }
}
template <int kCount>
__device__ __forceinline__ void load_shared(double (&to)[kCount], const double* from) {
  static_assert(kCount % 2 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const double2 part = *reinterpret_cast<const double2*>(from + i);
    to[i] = part.x, to[i + 1] = part.y;
  }
}

// Every thread copies one column of candidates and one of rows i, so that little is held in
// registers between the steps.
template <typename Scalar>
__device__ __forceinline__ void load_stage(const CodecParams<Scalar>& params,
                                           CodecStage<Scalar>& stage, int64_t first_row,
                                           int64_t first_candidate, int64_t first_step) {
  using Tile = CodecTile<Scalar>;
  constexpr int kThreads = 32 * kCodecWarps, kWidth = Tile::kBlockCandidates;
  static_assert(kThreads % kWidth == 0 && kThreads % Tile::kBlockRows == 0);
  const int left = static_cast<int>(min(int64_t{kCodecSteps}, params.rows - first_step));
  const int column = threadIdx.x % kWidth;
  const Scalar* features =
      params.features + first_step * params.candidates + first_candidate + column;
  const bool candidate = first_candidate + column < params.candidates;
#pragma unroll
  for (int j = threadIdx.x / kWidth; j < kCodecSteps; j += kThreads / kWidth) {
    const bool inside = candidate && j < left;
    cp_async<sizeof(Scalar)>(&stage.features[j][column],
                             inside ? features + j * params.candidates : params.features,
                             inside ? sizeof(Scalar) : 0);
  }
  // Symmetric: row j of the distances holds those of the rows i side by side.
  const int row = threadIdx.x % Tile::kBlockRows;
  const Scalar* distances = params.distances + first_step * params.rows + first_row + row;
#pragma unroll
  for (int j = threadIdx.x / Tile::kBlockRows; j < kCodecSteps; j += kThreads / Tile::kBlockRows) {
    const bool inside = first_row + row < params.rows && j < left;
    cp_async<sizeof(Scalar)>(&stage.distances[j][row],
                             inside ? distances + j * params.rows : params.distances,
                             inside ? sizeof(Scalar) : 0);
  }
  if (threadIdx.x < kCodecSteps)
    stage.rank[threadIdx.x] =
        static_cast<int>(threadIdx.x) < left ? params.rank[first_step + threadIdx.x] : 0;
}

// A row is not its own neighbour, and rows past the last one are nobody's: infinitely far. Each
// thread mends what it has copied itself.
template <typename Scalar>
__device__ __forceinline__ void exclude_rows(const CodecParams<Scalar>& params,
                                             CodecStage<Scalar>& stage, int64_t first_row,
                                             int64_t first_step) {
  using Tile = CodecTile<Scalar>;
  if (first_step + kCodecSteps <= params.rows &&
      (first_step + kCodecSteps <= first_row || first_row + Tile::kBlockRows <= first_step))
    return;
  const int64_t i = first_row + threadIdx.x % Tile::kBlockRows;
  for (int j = threadIdx.x / Tile::kBlockRows; j < kCodecSteps;
       j += 32 * kCodecWarps / Tile::kBlockRows) {
    if (i == first_step + j || first_step + j >= params.rows)
      stage.distances[j][threadIdx.x % Tile::kBlockRows] = std::numeric_limits<Scalar>::infinity();
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(32 * kCodecWarps, 2)
    codec_joined_kernel(const __grid_constant__ CodecParams<Scalar> params) {
  using Tile = CodecTile<Scalar>;
  constexpr int kRows = Tile::kRows, kCandidates = Tile::kCandidates;
  __shared__ CodecStage<Scalar> stages[2];
  __shared__ int32_t sums[Tile::kBlockCandidates];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = blockIdx.x % params.row_blocks * Tile::kBlockRows;
  const int64_t first_candidate = blockIdx.x / params.row_blocks * Tile::kBlockCandidates;
  const int64_t row = first_row + warp * kRows;
  const int64_t candidate = first_candidate + lane * kCandidates;
  for (int c = threadIdx.x; c < Tile::kBlockCandidates; c += 32 * kCodecWarps) sums[c] = 0;

  load_stage(params, stages[0], first_row, first_candidate, 0);
  cp_async_commit();
  Scalar here[kRows][kCandidates], best[kRows][kCandidates];
  int32_t best_rank[kRows][kCandidates];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCandidates; ++c) {
      const bool inside = row + r < params.rows && candidate + c < params.candidates;
      here[r][c] =
          inside ? params.features[(row + r) * params.candidates + candidate + c] : Scalar{0};
      best[r][c] = std::numeric_limits<Scalar>::infinity();
      best_rank[r][c] = 0;
    }
  }

  const int64_t steps = (params.rows + kCodecSteps - 1) / kCodecSteps;
  for (int64_t step = 0; step < steps; ++step) {
    CodecStage<Scalar>& stage = stages[step % 2];
    if (step + 1 < steps) {
      load_stage(params, stages[(step + 1) % 2], first_row, first_candidate,
                 (step + 1) * kCodecSteps);
    }
    cp_async_commit();
    cp_async_wait<1>();
    exclude_rows(params, stage, first_row, step * kCodecSteps);
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < kCodecSteps; ++j) {
      Scalar there[kCandidates], distance[kRows];
      load_shared(there, &stage.features[j][lane * kCandidates]);
      load_shared(distance, &stage.distances[j][warp * kRows]);
      const int32_t rank = stage.rank[j];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kCandidates; ++c) {
          const Scalar difference = there[c] - here[r][c];
          const Scalar joined = difference * difference + distance[r];
          // Rows come in order, so that the first of equally near ones stays.
          const bool closer = joined < best[r][c];
          best[r][c] = closer ? joined : best[r][c];
          best_rank[r][c] = closer ? rank : best_rank[r][c];
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int c = 0; c < kCandidates; ++c) {
    int32_t sum = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r < params.rows) sum += min(params.rank[row + r], best_rank[r][c]);
    }
    atomicAdd(sums + lane * kCandidates + c, sum);  // integers: the order does not matter
  }
  __syncthreads();
  for (int c = threadIdx.x; c < Tile::kBlockCandidates; c += 32 * kCodecWarps) {
    if (first_candidate + c < params.candidates)
      atomicAdd(params.sums + first_candidate + c, static_cast<unsigned long long>(sums[c]));
  }
}

// ---- nothing chosen

// One block sorts a feature with its rows, ascending, equal keys in order of row (bitonic).
template <typename Key>
__device__ __forceinline__ void sort_line(Key* keys, int32_t* rows, int padded) {
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = threadIdx.x; pair < padded / 2; pair += kLineThreads) {
        const int low = pair / stride * (2 * stride) + pair % stride, high = low + stride;
        const Key a = keys[low], b = keys[high];
        const int32_t row_a = rows[low], row_b = rows[high];
        const bool descending = low & size;
        if ((a > b || (a == b && row_a > row_b)) != descending) {
          keys[low] = b;
          keys[high] = a;
          rows[low] = row_b;
          rows[high] = row_a;
        }
      }
      __syncthreads();
    }
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kLineThreads, 2)  // at three, 12.0 spills in double
    codec_line_kernel(const __grid_constant__ CodecLineParams<Scalar> params) {
  using Key = LineKey<Scalar>;
  __shared__ unsigned long long warp_sums[kLineThreads / 32];
  auto* keys = params.workspace
                   ? reinterpret_cast<Key*>(static_cast<unsigned char*>(params.workspace) +
                                            blockIdx.x * line_bytes(params.padded, sizeof(Scalar)))
                   : dynamic_shared<Key>();
  auto* rows = reinterpret_cast<int32_t*>(keys + params.padded);
  for (int64_t c = blockIdx.x; c < params.candidates; c += gridDim.x) {
    if (!params.wanted[c]) continue;
    for (int i = threadIdx.x; i < params.padded; i += kLineThreads) {
      keys[i] = i < params.rows ? line_key(params.features[i * params.candidates + c])
                                : static_cast<Key>(~Key{0});
      rows[i] = i;
    }
    __syncthreads();
    sort_line(keys, rows, params.padded);
    unsigned long long sum = 0;
    for (int place = threadIdx.x; place < params.rows; place += kLineThreads) {
      const int nearest = nearest_on_line<Scalar>(keys, rows, static_cast<int>(params.rows), place);
      if (nearest >= 0)
        sum += static_cast<unsigned>(min(params.rank[rows[place]], params.rank[nearest]));
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();  // also: the line is read, the next one may be written over it
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kLineThreads / 32; ++warp) sum += warp_sums[warp];
      params.sums[c] = sum;
    }
  }
}

// ---- both

__global__ void __launch_bounds__(kFormulaThreads)
    codec_finish_kernel(const __grid_constant__ CodecFinishParams params) {
  __shared__ long long parts[2][kFormulaThreads / 32];
  CodecFormula formula{params.chosen ? 1 : params.rows, 0, 0};
  for (int64_t i = threadIdx.x; i < params.rows; i += kFormulaThreads)
    add_row(formula, params.chosen, params.rows, params.rank_terms[i],
            params.rank_terms[params.rows + i]);
  const long long offset = warp_sum<long long>(formula.offset);
  const long long denominator = warp_sum<long long>(formula.denominator);
  if (threadIdx.x % 32 == 0) {
    parts[0][threadIdx.x / 32] = offset;
    parts[1][threadIdx.x / 32] = denominator;
  }
  __syncthreads();
  formula.offset = formula.denominator = 0;
  for (int warp = 0; warp < kFormulaThreads / 32; ++warp) {
    formula.offset += parts[0][warp];
    formula.denominator += parts[1][warp];
  }
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFormulaThreads + threadIdx.x;
  if (c >= params.candidates) return;
  params.scores[c] = params.wanted[c] ? codec_score(formula, static_cast<int64_t>(params.sums[c]))
                                      : -std::numeric_limits<double>::infinity();
}

}  // namespace
}  // namespace fastunlearn
