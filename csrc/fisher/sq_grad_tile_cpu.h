// The squared per-sample gradient on a CPU: the loop shared by Linear and Conv2d.
//
// One factor is packed into panels of kSquareLanes features (the lanes of the registers), the other
// is read where it lies, one number at a time (the rows). A register tile holds the product of the
// running sample and the sum of squares over a block of samples, so that a square costs one
// instruction. Linear takes the input's features for lanes; a convolution the output channels,
// because the patches can then be read from the padded image itself: nothing is unfolded.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/block_sum.h"
#include "common/check.h"
#include "common/cpu.h"
#include "common/tasks_cpu.h"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {

inline constexpr int kSquareRows = 6;  // 6 x 2 products and squares: 24 of AVX-512's 32 registers
template <typename T>
inline constexpr int kSquareLanes = 2 * VectorOf<T>::kLanes;

// A task owns at most kTileSubtiles x kTilePanels register tiles, whose sums it keeps in its cache.
inline constexpr int kTileSubtiles = 8;
inline constexpr int kTilePanels = 4;
template <typename T>
inline constexpr int kTileStride = kTilePanels * kSquareLanes<T>;

// Positions after which a running product is set aside: a rounding error that grows with the length
// of one chain.
inline constexpr int kSquareChain = 128;
// Positions that a block of samples should fill: with few positions a sample, several samples pass
// through the registers before their squares are added to the tile.
inline constexpr int kBlockPositions = 128;
// Positions of a unit that are packed by one task.
inline constexpr int64_t kStretchPositions = 512;
// Packed numbers of one chunk of samples, for all threads: part of the L3 cache.
inline constexpr int64_t kChunkBytes = int64_t{4} << 20;

// squares[i, l] += sum_n (sum_t rows[i][n step + offsets[t]] * lanes[n, t, l])^2 for one register
// tile: lanes [samples, positions, kSquareLanes], squares [kSquareRows, kTileStride]. With `half`,
// only the first half of the lanes.
void square_products_cpu(const float* lanes, const float* const* rows, const int* offsets,
                         int64_t step, int positions, int samples, bool half, float* squares);
void square_products_cpu(const double* lanes, const double* const* rows, const int* offsets,
                         int64_t step, int positions, int samples, bool half, double* squares);

// to[j, i] = from[i, j], or += with `add`, for i < rows and j < columns.
void transpose_cpu(const float* from, int64_t from_stride, int rows, int columns, bool add,
                   float* to, int64_t to_stride);
void transpose_cpu(const double* from, int64_t from_stride, int rows, int columns, bool add,
                   double* to, int64_t to_stride);

// How a task's tile is cut, and how many samples are packed at once. None of it changes the order
// in which one weight's squares are summed, except for chunks and blocks, which do not depend on
// the number of threads.
struct SqGradCpuPlan {
  int64_t row_tiles = 0, lane_tiles = 0;
  int subtiles = kTileSubtiles, panels = kTilePanels;  // of one task
  int64_t chunk = 0;                                   // samples
  int block = 0;                                       // samples
};

template <typename T>
SqGradCpuPlan plan_sq_grad_cpu(const SqGradShape& shape, int64_t rows, int64_t lanes,
                               int64_t packed_per_sample, int64_t threads) {
  SqGradCpuPlan plan;
  const int64_t all_subtiles = ceil_div(rows, kSquareRows);
  const int64_t all_panels = ceil_div(lanes, kSquareLanes<T>);
  auto tasks = [&] {
    plan.row_tiles = ceil_div(all_subtiles, plan.subtiles);
    plan.lane_tiles = ceil_div(all_panels, plan.panels);
    return shape.groups * plan.row_tiles * plan.lane_tiles;
  };
  // Four tasks a thread even out cores of unequal speed.
  while (tasks() < 4 * threads && plan.subtiles * plan.panels > 1) {
    (plan.subtiles > plan.panels ? plan.subtiles : plan.panels) /= 2;
  }
  plan.block =
      static_cast<int>(std::clamp<int64_t>(kBlockPositions / shape.positions, 1, kSumBlock));
  const int64_t fit = kChunkBytes / (packed_per_sample * int64_t{sizeof(T)} + 1);
  plan.chunk =
      std::clamp<int64_t>(fit / plan.block, 1, ceil_div(shape.samples, plan.block)) * plan.block;
  return plan;
}

// Lanes: count; pack(group, sample, first, panel) writes [positions, kSquareLanes], zeros after the
// last lane. Rows: count; units, unit_size; pack(group, sample, unit, to), skipped when units is 0;
// offsets [positions]; point(group, sample, packed, chunk, row) -> where a row's first position of
// a sample lies, packed being [units, chunk, unit_size]; step(), from one sample to the next.
// kLanesAreOut: the lanes are out's first axis, the rows its second.
template <bool kLanesAreOut, typename T, typename Lanes, typename Rows>
void sq_grad_cpu(const Tensor& like, const SqGradShape& shape, const Lanes& lanes, const Rows& rows,
                 T* out) {
  struct None {};
  struct Scratch {
    alignas(64) T squares[kTileSubtiles * kSquareRows * kTileStride<T>];
  };
  constexpr int kLanes = kSquareLanes<T>;
  const int64_t all_panels = ceil_div(lanes.count, kLanes);
  const int64_t panel_size = shape.positions * kLanes;
  const int64_t per_sample = shape.groups * (all_panels * panel_size + rows.units * rows.unit_size);
  const SqGradCpuPlan plan = plan_sq_grad_cpu<T>(shape, rows.count, lanes.count, per_sample,
                                                 torch::stable::get_num_threads());
  const std::array<int64_t, 1> size{
      ceil_div(plan.chunk * per_sample * int64_t{sizeof(T)} + 64, int64_t{sizeof(T)})};
  const Tensor workspace = torch::stable::new_empty(
      like, {size.data(), size.size()}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  T* const packed_lanes = static_cast<T*>(workspace.mutable_data_ptr());
  T* const packed_rows = packed_lanes + shape.groups * plan.chunk * all_panels * panel_size;
  const int64_t packs = all_panels + rows.units;
  const int64_t stretch = ceil_div(kStretchPositions, shape.positions);

  for (int64_t first = 0; first < shape.samples; first += plan.chunk) {
    const int64_t count = std::min(plan.chunk, shape.samples - first);
    const int64_t stretches = ceil_div(count, stretch);
    for_each_task<None>(shape.groups * packs * stretches, [&](None&, int64_t task) {
      const int64_t begin = task % stretches * stretch;
      const int64_t pack = task / stretches % packs;
      const int64_t group = task / stretches / packs;
      for (int64_t n = begin; n < std::min(count, begin + stretch); ++n) {
        if (pack < all_panels) {
          lanes.pack(group, first + n, pack * kLanes,
                     packed_lanes + ((group * all_panels + pack) * plan.chunk + n) * panel_size);
        } else {
          const int64_t unit = pack - all_panels;
          rows.pack(group, first + n, unit,
                    packed_rows + ((group * rows.units + unit) * plan.chunk + n) * rows.unit_size);
        }
      }
    });
    for_each_task<Scratch>(shape.groups * plan.row_tiles * plan.lane_tiles, [&](Scratch& scratch,
                                                                                int64_t task) {
      const int64_t panel = task % plan.lane_tiles * plan.panels;
      const int64_t row = task / plan.lane_tiles % plan.row_tiles * plan.subtiles * kSquareRows;
      const int64_t group = task / plan.lane_tiles / plan.row_tiles;
      const int panels = static_cast<int>(std::min<int64_t>(plan.panels, all_panels - panel));
      const int valid =
          static_cast<int>(std::min<int64_t>(plan.subtiles * kSquareRows, rows.count - row));
      const T* group_lanes = packed_lanes + group * all_panels * plan.chunk * panel_size;
      const T* group_rows = packed_rows + group * rows.units * plan.chunk * rows.unit_size;
      std::fill(scratch.squares,
                scratch.squares + ceil_div(valid, kSquareRows) * kSquareRows * kTileStride<T>,
                T(0));
      for (int64_t n = 0; n < count; n += plan.block) {
        const int samples = static_cast<int>(std::min<int64_t>(plan.block, count - n));
        for (int i = 0; i < valid; i += kSquareRows) {
          const T* at[kSquareRows];
          for (int r = 0; r < kSquareRows; ++r) {  // after the last row, the last one again
            at[r] = rows.point(group, first + n, n, group_rows, plan.chunk,
                               row + std::min(i + r, valid - 1));
          }
          for (int p = 0; p < panels; ++p) {
            square_products_cpu(group_lanes + ((panel + p) * plan.chunk + n) * panel_size, at,
                                rows.offsets.data(), rows.step(), static_cast<int>(shape.positions),
                                samples, lanes.count - (panel + p) * kLanes <= kLanes / 2,
                                scratch.squares + i * kTileStride<T> + p * kLanes);
          }
        }
      }
      const int64_t lane = panel * kLanes;
      const int columns = static_cast<int>(std::min<int64_t>(panels * kLanes, lanes.count - lane));
      if constexpr (kLanesAreOut) {
        transpose_cpu(scratch.squares, kTileStride<T>, valid, columns, true,
                      out + (group * lanes.count + lane) * rows.count + row, rows.count);
      } else {
        for (int i = 0; i < valid; ++i) {
          T* target = out + (group * rows.count + row + i) * lanes.count + lane;
          const T* sums = scratch.squares + i * kTileStride<T>;
          for (int j = 0; j < columns; ++j) target[j] += sums[j];
        }
      }
    });
  }
}

}  // namespace fastunlearn
