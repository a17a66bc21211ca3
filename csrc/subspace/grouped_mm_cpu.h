// The micro-kernel of the grouped products: a block of `a`, read where it lies, times a packed
// panel.
#pragma once

#include <cstdint>

namespace fastunlearn {

inline constexpr int kBlockDepth = 256;  // rows of the panel: at 80 columns of fp32, 80 KB of L2
inline constexpr int kBlockRows = 512;   // rows of out that share a panel

// The left factor, read where it is: element (i, k) lies at data[i * row_step + k * depth_step].
template <typename Scalar>
struct LeftFactor {
  const Scalar* data;
  int64_t row_step, depth_step;
};

// out[i, j] += sum_k a[i, k] panel[k, j]; panel and out have `columns` columns, a multiple of
// VectorOf<T>::kLanes, and lie on 64 bytes. With `upper`, what lies below the diagonal is left to
// chance.
void multiply_panel_cpu(const LeftFactor<float>& a, int rows, int depth, const float* panel,
                        int columns, bool upper, float* out);
void multiply_panel_cpu(const LeftFactor<double>& a, int rows, int depth, const double* panel,
                        int columns, bool upper, double* out);
void multiply_panel_cpu(const LeftFactor<float>& a, int rows, int depth, const double* panel,
                        int columns, bool upper, double* out);

// Rows first_row to first_row + depth of the normal matrix of `seed`, first_row a multiple of four.
void fill_normal_cpu(uint64_t seed, int64_t first_row, int depth, int columns, float* panel);
void fill_normal_cpu(uint64_t seed, int64_t first_row, int depth, int columns, double* panel);

}  // namespace fastunlearn
