// The product of two panels of patches on a CPU, in as many registers as the instruction set has.
#pragma once

#include "common/cpu.h"
#include "subspace/gram_conv2d.h"

namespace fastunlearn {

// A panel is [kPanelDepth patches, kPanelWidth features]: three AVX-512 registers wide, so that
// 8 x 3 of them hold a product, and 4 x 3 of AVX2's.
inline constexpr int kPanelDepth = 256;
static_assert(kPanelDepth % kGramChain == 0 && kGramFlush % kPanelDepth == 0);
template <typename T>
inline constexpr int kPanelWidth = 3 * VectorOf<T>::kLanes;
template <typename T>
inline constexpr int kPanelSize = kPanelDepth * kPanelWidth<T>;

// A tile is the product of kTilePanels by kTilePanels panels; the panels are 192 KB, in a core's
// L2.
inline constexpr int kTilePanels = 2;
template <typename T>
inline constexpr int kTileWidth = kTilePanels * kPanelWidth<T>;
template <typename T>
inline constexpr int kTileSize = kTileWidth<T> * kTileWidth<T>;

// tile[i, j] += sum_k weights[k] * left[k, i] * right[k, j] for i < rows, j < columns, and with
// `upper` only for those with i <= j; others of the tile [kPanelWidth, kTileWidth] may change too.
// weights: null for 1.
void multiply_panels_cpu(const float* left, const float* right, const float* weights, int depth,
                         int rows, int columns, bool upper, float* tile);
void multiply_panels_cpu(const double* left, const double* right, const double* weights, int depth,
                         int rows, int columns, bool upper, double* tile);

}  // namespace fastunlearn
