// Grouped products on CUDA: one block per tile of one product and piece of its depth.
#pragma once

#include "common/philox.h"
#include "common/scalar.cuh"
#include "subspace/grouped_mm.h"

namespace fastunlearn {

struct GroupedMember {
  const void* a;
  const void* b;  // null for a sketch
  void* out;      // [pieces, rows, columns]
  int64_t rows, depth;
  uint64_t seed;
  int32_t columns;
};

struct GroupedParams {
  GroupedMember members[kGroupedMembers];
  int32_t first_block[kGroupedMembers + 1];
  int32_t count;
};
static_assert(sizeof(GroupedParams) <= 32764, "CUDA passes up to 32,764 bytes of arguments");

// Sums of the pieces of one product, added up in order.
struct PiecesMember {
  const void* pieces;
  void* out;
  int64_t count, pieces_count;
};

struct PiecesParams {
  PiecesMember members[kGroupedMembers];
  int32_t first_block[kGroupedMembers + 1];
  int32_t count;
};

namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// The entry whose blocks this block is one of.
template <typename Params>
__device__ __forceinline__ int find_member(const Params& params) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = params.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (params.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// kTransposed: a is stored [depth, rows]; kSketch: b is normal_block(seed, ...).
template <typename Scalar, typename Acc, bool kTransposed, bool kSketch>
__global__ void __launch_bounds__(kGroupedThreads, 2)
    grouped_mm_kernel(const __grid_constant__ GroupedParams params) {
  __shared__ Acc a_tile[kGroupedDepth][kGroupedRows + 1];
  __shared__ Acc b_tile[kGroupedDepth][kGroupedColumns + 1];
  const int index = find_member(params);
  const GroupedMember& member = params.members[index];
  const auto* a = static_cast<const Scalar*>(member.a);
  const auto* b = static_cast<const Scalar*>(member.b);
  const int64_t tiles_columns = (member.columns + kGroupedColumns - 1) / kGroupedColumns;
  const int64_t tiles_rows = (member.rows + kGroupedRows - 1) / kGroupedRows;
  int64_t block = static_cast<int64_t>(blockIdx.x) - params.first_block[index];
  const int64_t first_column = block % tiles_columns * kGroupedColumns;
  block /= tiles_columns;
  const int64_t first_row = block % tiles_rows * kGroupedRows;
  const int64_t piece = block / tiles_rows;
  const int64_t first_depth = piece * kPieceDepth;
  const int64_t last_depth =
      first_depth + kPieceDepth < member.depth ? first_depth + kPieceDepth : member.depth;

  // Strided ownership (row + 32 i, column + 8 j): a warp reads consecutive shared words.
  constexpr int kRowThreads = kGroupedRows / kGroupedThreadTile;        // 32
  constexpr int kColumnThreads = kGroupedColumns / kGroupedThreadTile;  // 8
  const int row = threadIdx.x % kRowThreads;
  const int column = threadIdx.x / kRowThreads;
  Acc total[kGroupedThreadTile][kGroupedThreadTile] = {};

  for (int64_t depth = first_depth; depth < last_depth; depth += kGroupedDepth) {
    for (int i = threadIdx.x; i < kGroupedDepth * kGroupedRows; i += kGroupedThreads) {
      const int k = kTransposed ? i / kGroupedRows : i % kGroupedDepth;
      const int r = kTransposed ? i % kGroupedRows : i / kGroupedDepth;
      const bool inside = depth + k < last_depth && first_row + r < member.rows;
      const int64_t at = kTransposed ? (depth + k) * member.rows + first_row + r
                                     : (first_row + r) * member.depth + depth + k;
      a_tile[k][r] = inside ? static_cast<Acc>(a[at]) : Acc(0);
    }
    if constexpr (kSketch) {
      // Four rows of one column from one call; the first depth of a tile is a multiple of four.
      for (int i = threadIdx.x; i < kGroupedDepth / 4 * kGroupedColumns; i += kGroupedThreads) {
        const int c = i % kGroupedColumns;
        const int quad = i / kGroupedColumns;
        const NormalBlock normal =
            normal_block(member.seed, static_cast<uint64_t>(depth) / 4 + quad,
                         static_cast<uint64_t>(first_column) + c);
#pragma unroll
        for (int k = 0; k < 4; ++k) b_tile[4 * quad + k][c] = static_cast<Acc>(normal.value[k]);
      }
    } else {
      for (int i = threadIdx.x; i < kGroupedDepth * kGroupedColumns; i += kGroupedThreads) {
        const int c = i % kGroupedColumns;
        const int k = i / kGroupedColumns;
        const bool inside = depth + k < last_depth && first_column + c < member.columns;
        b_tile[k][c] =
            inside ? static_cast<Acc>(b[(depth + k) * member.columns + first_column + c]) : Acc(0);
      }
    }
    __syncthreads();
    Acc sum[kGroupedThreadTile][kGroupedThreadTile] = {};
#pragma unroll
    for (int k = 0; k < kGroupedDepth; ++k) {
      Acc x[kGroupedThreadTile], y[kGroupedThreadTile];
#pragma unroll
      for (int i = 0; i < kGroupedThreadTile; ++i) x[i] = a_tile[k][row + kRowThreads * i];
#pragma unroll
      for (int j = 0; j < kGroupedThreadTile; ++j) y[j] = b_tile[k][column + kColumnThreads * j];
#pragma unroll
      for (int i = 0; i < kGroupedThreadTile; ++i) {
#pragma unroll
        for (int j = 0; j < kGroupedThreadTile; ++j) sum[i][j] += x[i] * y[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kGroupedThreadTile; ++i) {
#pragma unroll
      for (int j = 0; j < kGroupedThreadTile; ++j) total[i][j] += sum[i][j];
    }
    __syncthreads();
  }

  Acc* out = static_cast<Acc*>(member.out) + piece * member.rows * member.columns;
#pragma unroll
  for (int i = 0; i < kGroupedThreadTile; ++i) {
#pragma unroll
    for (int j = 0; j < kGroupedThreadTile; ++j) {
      const int64_t r = first_row + row + kRowThreads * i;
      const int64_t c = first_column + column + kColumnThreads * j;
      if (r < member.rows && c < member.columns) out[r * member.columns + c] = total[i][j];
    }
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kGroupedThreads)
    sum_pieces_kernel(const __grid_constant__ PiecesParams params) {
  const int index = find_member(params);
  const PiecesMember& member = params.members[index];
  const int64_t block = static_cast<int64_t>(blockIdx.x) - params.first_block[index];
  const int64_t i = block * kGroupedThreads + threadIdx.x;
  if (i >= member.count) return;
  const auto* pieces = static_cast<const Acc*>(member.pieces);
  Acc sum = pieces[i];
  for (int64_t p = 1; p < member.pieces_count; ++p) sum += pieces[p * member.count + i];
  static_cast<Acc*>(member.out)[i] = sum;
}

}  // namespace
}  // namespace fastunlearn
