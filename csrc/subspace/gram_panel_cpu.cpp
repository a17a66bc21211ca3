// The micro-kernel, written once and compiled for the registers of three instruction sets.
#include "subspace/gram_panel_cpu.h"

#include <algorithm>

namespace fastunlearn {
namespace {

// kRows x kVectors registers of kBytes hold the sums of one chain.
template <bool kWeighted, int kRows, int kVectors, int kBytes, typename T>
FASTUNLEARN_INLINE void multiply_block(const T* left, const T* right, const T* weights, int depth,
                                       T* tile) {
  using Vector = typename VectorOf<T, kBytes>::type;
  constexpr int kLanes = VectorOf<T, kBytes>::kLanes;
  for (int first = 0; first < depth; first += kGramChain) {
    const int last = std::min(depth, first + kGramChain);
    Vector sum[kRows][kVectors] = {};
    for (int k = first; k < last; ++k) {
      const T* a = left + k * kPanelWidth<T>;
      const T* b = right + k * kPanelWidth<T>;
      Vector row[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        row[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
        if constexpr (kWeighted) row[v] *= weights[k];
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v] += row[v] * a[i];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<Vector*>(tile + i * kTileWidth<T> + v * kLanes) += sum[i][v];
    }
  }
}

template <bool kWeighted, int kRows, int kBytes, typename T>
FASTUNLEARN_INLINE void multiply_weighted(const T* left, const T* right, const T* weights,
                                          int depth, int rows, int columns, bool upper, T* tile) {
  constexpr int kLanes = VectorOf<T, kBytes>::kLanes;
  static_assert(kPanelWidth<T> % kRows == 0 && kPanelWidth<T> % kLanes == 0);
  for (int i = 0; i < rows; i += kRows) {
    int j = upper ? i / kLanes * kLanes : 0;
    while (j < columns) {
      T* at = tile + i * kTileWidth<T> + j;
      const int left_over = (columns - j + kLanes - 1) / kLanes;
      if (left_over >= 3) {
        multiply_block<kWeighted, kRows, 3, kBytes>(left + i, right + j, weights, depth, at);
      } else if (left_over == 2) {
        multiply_block<kWeighted, kRows, 2, kBytes>(left + i, right + j, weights, depth, at);
      } else {
        multiply_block<kWeighted, kRows, 1, kBytes>(left + i, right + j, weights, depth, at);
      }
      j += 3 * kLanes;
    }
  }
}

template <int kRows, int kBytes, typename T>
FASTUNLEARN_INLINE void multiply_panels(const T* left, const T* right, const T* weights, int depth,
                                        int rows, int columns, bool upper, T* tile) {
  if (weights != nullptr) {
    multiply_weighted<true, kRows, kBytes>(left, right, weights, depth, rows, columns, upper, tile);
  } else {
    multiply_weighted<false, kRows, kBytes>(left, right, weights, depth, rows, columns, upper,
                                            tile);
  }
}

}  // namespace

// Versions of one function of which the loader picks the best: FASTUNLEARN_CPU_CLONES with another
// block in each, so that it fills the registers and no more. Chosen where they are called, hence
// here.
#define FASTUNLEARN_PANELS(attribute, T, block_rows, bytes)                                       \
  attribute void multiply_panels_version(const T* left, const T* right, const T* weights,         \
                                         int depth, int rows, int columns, bool upper, T* tile) { \
    multiply_panels<block_rows, bytes>(left, right, weights, depth, rows, columns, upper, tile);  \
  }
#ifdef FASTUNLEARN_CPU_VERSIONS
FASTUNLEARN_PANELS(__attribute__((target("arch=x86-64-v4"))), float, 8, 64)
FASTUNLEARN_PANELS(__attribute__((target("arch=x86-64-v4"))), double, 8, 64)
FASTUNLEARN_PANELS(__attribute__((target("arch=x86-64-v3"))), float, 4, 32)
FASTUNLEARN_PANELS(__attribute__((target("arch=x86-64-v3"))), double, 4, 32)
FASTUNLEARN_PANELS(__attribute__((target("default"))), float, 4, 16)
FASTUNLEARN_PANELS(__attribute__((target("default"))), double, 4, 16)
#else
FASTUNLEARN_PANELS(, float, 4, 16)
FASTUNLEARN_PANELS(, double, 4, 16)
#endif
#undef FASTUNLEARN_PANELS

void multiply_panels_cpu(const float* left, const float* right, const float* weights, int depth,
                         int rows, int columns, bool upper, float* tile) {
  multiply_panels_version(left, right, weights, depth, rows, columns, upper, tile);
}

void multiply_panels_cpu(const double* left, const double* right, const double* weights, int depth,
                         int rows, int columns, bool upper, double* tile) {
  multiply_panels_version(left, right, weights, depth, rows, columns, upper, tile);
}

}  // namespace fastunlearn
