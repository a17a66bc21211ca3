// The tile of a product of matrices that one CUDA block owns, for every kernel that multiplies.
#pragma once

#include <cstdint>

namespace fastunlearn {

inline constexpr int kTileOut = 64;    // rows of the product per block
inline constexpr int kTileIn = 64;     // columns of the product per block
inline constexpr int kTileDepth = 16;  // terms of the sum per step
inline constexpr int kTileThreads = 256;
inline constexpr int kThreadOut = 4;  // each thread owns kThreadOut x kThreadIn of the tile
inline constexpr int kThreadIn = 4;
static_assert(kTileOut * kTileIn == kTileThreads * kThreadOut * kThreadIn);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastunlearn
