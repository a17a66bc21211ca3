// The clones of the micro-kernel and of the random panel.
#include "subspace/grouped_mm_cpu.h"

#include <algorithm>

#include "common/cpu.h"
#include "common/philox.h"

namespace fastunlearn {
namespace {

// kRows x kVectors accumulators: 8 x 2 of AVX-512's 32 registers leave room for the panel's row.
template <int kRows, int kVectors, typename Scalar, typename T>
FASTUNLEARN_INLINE void multiply_tile(const Scalar* a, int64_t row_step, int64_t depth_step,
                                      int depth, const T* panel, int columns, T* out) {
  using Vector = typename VectorOf<T>::type;
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector sum[kRows][kVectors] = {};
  for (int k = 0; k < depth; ++k) {
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v)
      row[v] = *reinterpret_cast<const Vector*>(panel + k * columns + v * kLanes);
    const Scalar* x = a + k * depth_step;
    for (int i = 0; i < kRows; ++i) {
      const T value = static_cast<T>(x[i * row_step]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] += row[v] * value;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<Vector*>(out + i * columns + v * kLanes) += sum[i][v];
  }
}

template <int kVectors, typename Scalar, typename T>
FASTUNLEARN_INLINE void multiply_columns(const LeftFactor<Scalar>& a, int rows, int depth,
                                         const T* panel, int columns, T* out) {
  int i = 0;
  for (; i + 8 <= rows; i += 8)
    multiply_tile<8, kVectors>(a.data + i * a.row_step, a.row_step, a.depth_step, depth, panel,
                               columns, out + i * columns);
  for (; i < rows; ++i)
    multiply_tile<1, kVectors>(a.data + i * a.row_step, a.row_step, a.depth_step, depth, panel,
                               columns, out + i * columns);
}

template <typename Scalar, typename T>
FASTUNLEARN_INLINE void multiply_panel(const LeftFactor<Scalar>& a, int rows, int depth,
                                       const T* panel, int columns, bool upper, T* out) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  int j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    multiply_columns<2>(a, upper ? std::min(rows, j + 2 * kLanes) : rows, depth, panel + j, columns,
                        out + j);
  if (j < columns) multiply_columns<1>(a, rows, depth, panel + j, columns, out + j);
}

template <typename T>
FASTUNLEARN_INLINE void fill_normal(uint64_t seed, int64_t first_row, int depth, int columns,
                                    T* panel) {
  for (int k = 0; k < depth; k += 4) {
    const uint64_t block = static_cast<uint64_t>(first_row + k) / 4;
    T* rows = panel + k * columns;
    for (int c = 0; c < columns; ++c) {
      const NormalBlock normal = normal_block(seed, block, static_cast<uint64_t>(c));
      rows[c] = normal.value[0];
      rows[columns + c] = normal.value[1];
      rows[2 * columns + c] = normal.value[2];
      rows[3 * columns + c] = normal.value[3];
    }
  }
}

}  // namespace

FASTUNLEARN_CPU_CLONES
void multiply_panel_cpu(const LeftFactor<float>& a, int rows, int depth, const float* panel,
                        int columns, bool upper, float* out) {
  multiply_panel(a, rows, depth, panel, columns, upper, out);
}

FASTUNLEARN_CPU_CLONES
void multiply_panel_cpu(const LeftFactor<double>& a, int rows, int depth, const double* panel,
                        int columns, bool upper, double* out) {
  multiply_panel(a, rows, depth, panel, columns, upper, out);
}

FASTUNLEARN_CPU_CLONES
void multiply_panel_cpu(const LeftFactor<float>& a, int rows, int depth, const double* panel,
                        int columns, bool upper, double* out) {
  multiply_panel(a, rows, depth, panel, columns, upper, out);
}

FASTUNLEARN_CPU_CLONES
void fill_normal_cpu(uint64_t seed, int64_t first_row, int depth, int columns, float* panel) {
  fill_normal(seed, first_row, depth, columns, panel);
}

FASTUNLEARN_CPU_CLONES
void fill_normal_cpu(uint64_t seed, int64_t first_row, int depth, int columns, double* panel) {
  fill_normal(seed, first_row, depth, columns, panel);
}

}  // namespace fastunlearn
