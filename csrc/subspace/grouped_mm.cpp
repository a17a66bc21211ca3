// grouped_mm_ and sketch_ on a CPU: threads over blocks of rows of all products.
#include "subspace/grouped_mm.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>

#include "common/cpu.h"
#include "common/tasks_cpu.h"
#include "subspace/grouped_mm_cpu.h"
#include "subspace/lowrank_doors.h"

namespace fastunlearn {
namespace {

struct GroupedTask {
  int64_t member;
  int64_t first_row;
  int64_t piece;
};

template <typename Scalar, typename T>
void grouped(const std::vector<Tensor>& out, const GroupedDoor& door,
             const std::vector<int64_t>* seeds, bool transpose) {
  std::vector<GroupedTask> tasks;
  std::vector<std::unique_ptr<T[]>> pieces(out.size());  // [pieces, rows, columns]
  int64_t widest = 0;
  for (const GroupedLaunch& launch : plan_grouped(door.shapes)) {
    for (const int64_t i : launch.members) {
      const GroupedShape& shape = door.shapes[i];
      widest = std::max(widest, shape.columns);
      const int64_t count = grouped_pieces(shape);
      if (count > 1)
        pieces[i] = std::make_unique_for_overwrite<T[]>(count * shape.rows * shape.columns);
      for (int64_t piece = 0; piece < count; ++piece) {
        for (int64_t row = 0; row < shape.rows; row += kBlockRows) tasks.push_back({i, row, piece});
      }
    }
  }
  constexpr int kLanes = VectorOf<T>::kLanes;
  const int64_t stride = (widest + kLanes - 1) / kLanes * kLanes;
  struct Scratch {
    std::vector<CacheLine> panel, block;
  };
  auto make_scratch = [&] {
    return Scratch{std::vector<CacheLine>(kBlockDepth * stride / kLanes),
                   std::vector<CacheLine>(kBlockRows * stride / kLanes)};
  };
  for_each_task(static_cast<int64_t>(tasks.size()), make_scratch, [&](Scratch& scratch, int64_t t) {
    const auto [i, first_row, piece] = tasks[t];
    const GroupedShape& shape = door.shapes[i];
    const int columns = static_cast<int>((shape.columns + kLanes - 1) / kLanes * kLanes);
    const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, shape.rows - first_row));
    const int64_t row_step = transpose ? 1 : shape.depth;
    const int64_t depth_step = transpose ? shape.rows : 1;
    const auto* a = static_cast<const Scalar*>(door.a[i].const_data_ptr()) + first_row * row_step;
    const auto* b = seeds ? nullptr : static_cast<const Scalar*>(door.b[i].const_data_ptr());
    T* panel = reinterpret_cast<T*>(scratch.panel.data());
    T* block = reinterpret_cast<T*>(scratch.block.data());
    // a^T a: half of it is the mirror of the other half, and the panel holds both factors.
    const bool gram = !seeds && transpose && static_cast<const void*>(a) == b &&
                      shape.rows == shape.columns && shape.rows <= kBlockRows;
    std::memset(block, 0, sizeof(T) * rows * columns);
    const int64_t last = std::min((piece + 1) * kPieceDepth, shape.depth);
    for (int64_t depth = piece * kPieceDepth; depth < last; depth += kBlockDepth) {
      const int steps = static_cast<int>(std::min<int64_t>(kBlockDepth, last - depth));
      if (seeds) {
        fill_normal_cpu(static_cast<uint64_t>((*seeds)[i]), depth, (steps + 3) / 4 * 4, columns,
                        panel);
      } else {
        for (int k = 0; k < steps; ++k) {
          const Scalar* from = b + (depth + k) * shape.columns;
          T* to = panel + k * columns;
          for (int64_t j = 0; j < shape.columns; ++j) to[j] = from[j];
          for (int64_t j = shape.columns; j < columns; ++j) to[j] = 0;
        }
      }
      if (gram) {
        multiply_panel_cpu(LeftFactor<T>{panel, 1, columns}, rows, steps, panel, columns, true,
                           block);
      } else {
        multiply_panel_cpu(LeftFactor<Scalar>{a + depth * depth_step, row_step, depth_step}, rows,
                           steps, panel, columns, false, block);
      }
    }
    for (int r = 1; gram && r < rows; ++r) {
      for (int c = 0; c < r; ++c) block[r * columns + c] = block[c * columns + r];
    }
    T* target = pieces[i] ? pieces[i].get() + piece * shape.rows * shape.columns
                          : static_cast<T*>(out[i].mutable_data_ptr());
    for (int r = 0; r < rows; ++r) {
      std::memcpy(target + (first_row + r) * shape.columns, block + r * columns,
                  sizeof(T) * shape.columns);
    }
  });
  for (size_t i = 0; i < out.size(); ++i) {
    if (!pieces[i]) continue;
    const int64_t count = door.shapes[i].rows * door.shapes[i].columns;
    T* total = static_cast<T*>(out[i].mutable_data_ptr());
    std::memcpy(total, pieces[i].get(), sizeof(T) * count);
    for (int64_t p = 1; p < grouped_pieces(door.shapes[i]); ++p) {
      for (int64_t j = 0; j < count; ++j) total[j] += pieces[i][p * count + j];
    }
  }
}

void grouped_cpu(const std::vector<Tensor>& out, const GroupedDoor& door,
                 const std::vector<int64_t>* seeds, bool transpose) {
  if (out.empty()) return;
  if (door.widened) return grouped<float, double>(out, door, seeds, transpose);
  if (out[0].scalar_type() == ScalarType::Double)
    return grouped<double, double>(out, door, seeds, transpose);
  grouped<float, float>(out, door, seeds, transpose);
}

void grouped_mm_cpu(const std::vector<Tensor>& out, const std::vector<Tensor>& a,
                    const std::vector<Tensor>& b, bool transpose) {
  grouped_cpu(out, GroupedDoor("grouped_mm_", out, a, &b, nullptr, transpose), nullptr, transpose);
}

void sketch_cpu(const std::vector<Tensor>& out, const std::vector<Tensor>& matrices,
                const std::vector<int64_t>& seeds, bool transpose) {
  grouped_cpu(out, GroupedDoor("sketch_", out, matrices, nullptr, &seeds, transpose), &seeds,
              transpose);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("grouped_mm_", TORCH_BOX(&grouped_mm_cpu));
  m.impl("sketch_", TORCH_BOX(&sketch_cpu));
}

}  // namespace fastunlearn
