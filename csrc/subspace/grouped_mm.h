// Products of many matrices of different shapes in one launch: out_i = op(a_i) b_i, where b_i may
// be a matrix of random normal numbers that is never stored.
//
// How a product is cut depends on its own shape alone, so its bits do not depend on what else is in
// the list, on the number of threads or on the GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastunlearn {

inline constexpr int kGroupedMembers = 400;   // products per launch
inline constexpr int64_t kPieceDepth = 2048;  // terms of a sum that one block adds up
inline constexpr int kGroupedRows = 128;      // CUDA tile of out: rows ...
inline constexpr int kGroupedColumns = 32;    // ... and columns, few so that 80 columns waste 16
inline constexpr int kGroupedDepth = 16;
inline constexpr int kGroupedThreads = 256;
inline constexpr int kGroupedThreadTile = 4;  // each thread owns 4 x 4 of the tile
static_assert(kGroupedRows * kGroupedColumns == kGroupedThreads * 4 * kGroupedThreadTile);

// out [rows, columns] = sum over depth of a(row, k) * b[k, column].
struct GroupedShape {
  int64_t rows = 0;
  int64_t depth = 0;
  int64_t columns = 0;
};

inline int64_t grouped_pieces(const GroupedShape& shape) {
  return std::max<int64_t>(1, (shape.depth + kPieceDepth - 1) / kPieceDepth);
}

inline int64_t grouped_blocks(const GroupedShape& shape) {
  return (shape.rows + kGroupedRows - 1) / kGroupedRows *
         ((shape.columns + kGroupedColumns - 1) / kGroupedColumns) * grouped_pieces(shape);
}

struct GroupedLaunch {
  std::vector<int64_t> members;      // largest depth first; empty products left out
  std::vector<int32_t> first_block;  // before each member; the last one is the grid
};

// Deepest products first: the last blocks to finish are then short ones.
inline std::vector<GroupedLaunch> plan_grouped(const std::vector<GroupedShape>& shapes) {
  std::vector<int64_t> order;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i].rows > 0 && shapes[i].columns > 0) order.push_back(static_cast<int64_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return shapes[i].depth > shapes[j].depth; });
  std::vector<GroupedLaunch> launches;
  for (const int64_t i : order) {
    const int64_t blocks = grouped_blocks(shapes[i]);
    if (launches.empty() || launches.back().members.size() == kGroupedMembers ||
        launches.back().first_block.back() + blocks > INT32_MAX) {
      launches.push_back({{}, {0}});
    }
    launches.back().members.push_back(i);
    launches.back().first_block.push_back(static_cast<int32_t>(
        launches.back().first_block.back() + std::min<int64_t>(blocks, INT32_MAX)));
  }
  return launches;
}

}  // namespace fastunlearn
