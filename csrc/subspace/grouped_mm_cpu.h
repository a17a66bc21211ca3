// The micro-kernel of the grouped products: a block of `a`, read where it lies, times a packed
// panel.
#pragma once

#include <cstdint>

namespace fastunlearn {

inline constexpr int kBlockDepth = 256;  // rows of the panel: at 80 columns of fp32, 80 KB of L2
inline constexpr int kBlockRows = 512;   // rows of out that share a panel

// out[i, j] += sum_k a[i row_step + k depth_step] panel[k, j]; panel and out have `columns`
// columns, a multiple of VectorOf<T>::kLanes, and lie on 64 bytes.
void multiply_panel_cpu(const float* a, int64_t row_step, int64_t depth_step, int rows, int depth,
                        const float* panel, int columns, float* out);
void multiply_panel_cpu(const double* a, int64_t row_step, int64_t depth_step, int rows, int depth,
                        const double* panel, int columns, double* out);
void multiply_panel_cpu(const float* a, int64_t row_step, int64_t depth_step, int rows, int depth,
                        const double* panel, int columns, double* out);

// Rows first_row to first_row + depth of the normal matrix of `seed`, first_row a multiple of four.
void fill_normal_cpu(uint64_t seed, int64_t first_row, int depth, int columns, float* panel);
void fill_normal_cpu(uint64_t seed, int64_t first_row, int depth, int columns, double* panel);

}  // namespace fastunlearn
