// The squared per-sample gradient on a CPU: the loop shared by Linear and Conv2d.
//
// One factor is packed into panels of kSquareLanes features (the lanes of the registers), the other
// is read where it lies, one number at a time (the rows). A register tile holds the product of the
// running sample and the sum of squares over a block of samples, so that a square costs one
// instruction. Linear takes the input's features for lanes; a convolution the output channels,
// because the patches can then be read from the padded image itself: nothing is unfolded.
#pragma once

#include <algorithm>

#include "common/cpu.h"
#include "common/tasks_cpu.h"
#include "common/workspace.h"
#include "fisher/sq_grad_cpu_plan.h"

namespace fastunlearn {

template <typename T>
inline constexpr int kSquareLanes = kSquareLaneBytes / sizeof(T);
template <typename T>
inline constexpr int kSquareStride = kSquarePanels * kSquareLanes<T>;  // of a task's tile

// Positions after which a running product is set aside: a rounding error that grows with the length
// of one chain.
inline constexpr int kSquareChain = 128;
// Positions that one task packs, at least.
inline constexpr int64_t kPackedPositions = 512;

// squares[i, l] += sum_n (sum_t rows[i][n step + offsets[t]] * lanes[n, t, l])^2 for one register
// tile: lanes [samples, positions, kSquareLanes], squares [kSquareRows, kSquareStride]. With `half`
// at most the first half of the lanes is used.
void square_products_cpu(const float* lanes, const float* const* rows, const int* offsets,
                         int64_t step, int positions, int samples, bool half, float* squares);
void square_products_cpu(const double* lanes, const double* const* rows, const int* offsets,
                         int64_t step, int positions, int samples, bool half, double* squares);

// to[j, i] = from[i, j], or += with `add`, for i < rows and j < columns.
void transpose_cpu(const float* from, int64_t from_stride, int rows, int columns, bool add,
                   float* to, int64_t to_stride);
void transpose_cpu(const double* from, int64_t from_stride, int rows, int columns, bool add,
                   double* to, int64_t to_stride);

// Lanes: count; pack(group, sample, first, panel) writes [positions, kSquareLanes], zeros after the
// last lane. Rows: count; blocks of block_size numbers each, which pack(group, sample, block, to)
// writes (none where rows are read in place); offsets [positions]; row_pointer(group, sample, n,
// packed, chunk, row), where the first position of a row of a sample lies, the n-th of the packed
// [blocks, chunk, block_size]; step(), from one sample to the next. kLanesAreOut: the lanes are
// out's first axis, the rows its second.
template <bool kLanesAreOut, typename T, typename Lanes, typename Rows>
void sq_grad_cpu(const Tensor& like, const SqGradShape& shape, const Lanes& lanes, const Rows& rows,
                 T* out) {
  struct None {};
  struct Scratch {
    alignas(64) T squares[kSquareSubtiles * kSquareRows * kSquareStride<T>];
  };
  constexpr int kLanes = kSquareLanes<T>;
  const int64_t all_panels = ceil_div(lanes.count, kLanes);
  const int64_t panel_size = shape.positions * kLanes;
  const int64_t per_sample =
      shape.groups * (all_panels * panel_size + rows.blocks * rows.block_size);
  const SqGradCpuPlan plan = plan_sq_grad_cpu(shape, rows.count, lanes.count, per_sample, sizeof(T),
                                              torch::stable::get_num_threads());
  const Tensor packed = workspace<T>(like, plan.chunk * per_sample);
  T* const packed_lanes = static_cast<T*>(packed.mutable_data_ptr());
  T* const packed_rows = packed_lanes + shape.groups * plan.chunk * all_panels * panel_size;
  const int64_t packs = all_panels + rows.blocks;
  const int64_t samples_per_part = ceil_div(kPackedPositions, shape.positions);

  for (int64_t first = 0; first < shape.samples; first += plan.chunk) {
    const int64_t count = std::min(plan.chunk, shape.samples - first);
    const int64_t parts = ceil_div(count, samples_per_part);
    for_each_task<None>(shape.groups * packs * parts, [&](None&, int64_t task) {
      const int64_t begin = task % parts * samples_per_part;
      const int64_t pack = task / parts % packs;
      const int64_t group = task / parts / packs;
      for (int64_t n = begin; n < std::min(count, begin + samples_per_part); ++n) {
        if (pack < all_panels) {
          lanes.pack(group, first + n, pack * kLanes,
                     packed_lanes + ((group * all_panels + pack) * plan.chunk + n) * panel_size);
        } else {
          const int64_t block = pack - all_panels;
          rows.pack(
              group, first + n, block,
              packed_rows + ((group * rows.blocks + block) * plan.chunk + n) * rows.block_size);
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
      const T* group_rows = packed_rows + group * rows.blocks * plan.chunk * rows.block_size;
      std::fill(scratch.squares,
                scratch.squares + ceil_div(valid, kSquareRows) * kSquareRows * kSquareStride<T>,
                T(0));
      for (int64_t n = 0; n < count; n += plan.block) {
        const int samples = static_cast<int>(std::min<int64_t>(plan.block, count - n));
        for (int i = 0; i < valid; i += kSquareRows) {
          const T* at[kSquareRows];
          for (int r = 0; r < kSquareRows; ++r) {  // after the last row, the last one again
            at[r] = rows.row_pointer(group, first + n, n, group_rows, plan.chunk,
                                     row + std::min(i + r, valid - 1));
          }
          for (int p = 0; p < panels; ++p) {
            square_products_cpu(group_lanes + ((panel + p) * plan.chunk + n) * panel_size, at,
                                rows.offsets.data(), rows.step(), static_cast<int>(shape.positions),
                                samples, lanes.count - (panel + p) * kLanes <= kLanes / 2,
                                scratch.squares + i * kSquareStride<T> + p * kLanes);
          }
        }
      }
      const int64_t lane = panel * kLanes;
      const int columns = static_cast<int>(std::min<int64_t>(panels * kLanes, lanes.count - lane));
      if constexpr (kLanesAreOut) {
        transpose_cpu(scratch.squares, kSquareStride<T>, valid, columns, true,
                      out + (group * lanes.count + lane) * rows.count + row, rows.count);
      } else {
        for (int i = 0; i < valid; ++i) {
          T* target = out + (group * rows.count + row + i) * lanes.count + lane;
          const T* sums = scratch.squares + i * kSquareStride<T>;
          for (int j = 0; j < columns; ++j) target[j] += sums[j];
        }
      }
    });
  }
}

}  // namespace fastunlearn
