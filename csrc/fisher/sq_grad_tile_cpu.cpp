// The micro-kernels, written once and compiled for the registers of three instruction sets.
// Floating-point contraction is on, so each uses its own fused multiply-add.
#include "fisher/sq_grad_tile_cpu.h"

#include <utility>

#include "fisher/sq_grad_grouped_cpu.h"

namespace fastunlearn {
namespace {

// kRows x kVectors registers of kBytes for the product, and as many for the squares.
template <int kRows, int kVectors, int kBytes, typename T>
FASTUNLEARN_INLINE void square_block(const T* lanes, const T* const* rows, const int* offsets,
                                     int64_t step, int positions, int samples, T* squares) {
  using Vector = typename VectorOf<T, kBytes>::type;
  constexpr int kLanes = VectorOf<T, kBytes>::kLanes;
  Vector sum[kRows][kVectors] = {};
  const T* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = rows[i];
  // One position a sample: nothing to add up before the square.
  for (; positions == 1 && samples > 0; --samples, lanes += kSquareLanes<T>) {
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector product = *reinterpret_cast<const Vector*>(lanes + v * kLanes) * *row[i];
        sum[i][v] += product * product;
      }
      row[i] += step;
    }
  }
  for (int n = 0; n < samples; ++n) {
    Vector product[kRows][kVectors] = {};
    auto multiply = [&](int first, int last) __attribute__((always_inline)) {
      for (int t = first; t < last; ++t, lanes += kSquareLanes<T>) {
        const int64_t at = offsets[t];
        Vector lane[kVectors];
        for (int v = 0; v < kVectors; ++v)
          lane[v] = *reinterpret_cast<const Vector*>(lanes + v * kLanes);
        for (int i = 0; i < kRows; ++i) {
          for (int v = 0; v < kVectors; ++v) product[i][v] += lane[v] * row[i][at];
        }
      }
    };
    if (positions <= kSquareChain) {
      multiply(0, positions);
    } else {
      Vector before[kRows][kVectors] = {};
      for (int t = 0; t < positions; t += kSquareChain) {
        multiply(t, std::min(positions, t + kSquareChain));
        for (int i = 0; i < kRows; ++i) {
          for (int v = 0; v < kVectors; ++v) {
            before[i][v] += product[i][v];
            product[i][v] = Vector{};
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) product[i][v] = before[i][v];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[i][v] += product[i][v] * product[i][v];
      row[i] += step;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<Vector*>(squares + i * kSquareStride<T> + v * kLanes) += sum[i][v];
  }
}

template <int kRows, int kBytes, typename T>
FASTUNLEARN_INLINE void square_products(const T* lanes, const T* const* rows, const int* offsets,
                                        int64_t step, int positions, int samples, bool half,
                                        T* squares) {
  constexpr int kLanes = VectorOf<T, kBytes>::kLanes;
  static_assert(kSquareRows % kRows == 0 && kSquareLanes<T> % (2 * kLanes) == 0);
  const int columns = half ? kSquareLanes<T> / 2 : kSquareLanes<T>;
  for (int i = 0; i < kSquareRows; i += kRows) {
    for (int j = 0; j < columns; j += 2 * kLanes) {
      T* at = squares + i * kSquareStride<T> + j;
      if (j + 2 * kLanes <= columns) {
        square_block<kRows, 2, kBytes>(lanes + j, rows + i, offsets, step, positions, samples, at);
      } else {
        square_block<kRows, 1, kBytes>(lanes + j, rows + i, offsets, step, positions, samples, at);
      }
    }
  }
}

// One vector of kBytes after the other, so that kGroupTaps products fill the registers and no more.
template <int kBytes, typename T>
FASTUNLEARN_INLINE void square_group(const T* grads, const T* const* taps, const int* offsets,
                                     int positions, T* squares) {
  using Vector = typename VectorOf<T, kBytes>::type;
  for (int lane = 0; lane < kGroupLanes<T>; lane += VectorOf<T, kBytes>::kLanes) {
    const T* tap[kGroupTaps];
    for (int k = 0; k < kGroupTaps; ++k) tap[k] = taps[k] + lane;
    Vector before[kGroupTaps] = {};
    for (int first = 0; first < positions; first += kSquareChain) {
      const int last = std::min(positions, first + kSquareChain);
      Vector product[kGroupTaps] = {};
      for (int t = first; t < last; ++t) {
        const Vector grad =
            *reinterpret_cast<const Vector*>(grads + int64_t{t} * kGroupLanes<T> + lane);
        const int64_t at = offsets[t];
        for (int k = 0; k < kGroupTaps; ++k)
          product[k] += grad * *reinterpret_cast<const Vector*>(tap[k] + at);
      }
      for (int k = 0; k < kGroupTaps; ++k) before[k] += product[k];
    }
    for (int k = 0; k < kGroupTaps; ++k) {
      *reinterpret_cast<Vector*>(squares + k * kGroupLanes<T> + lane) += before[k] * before[k];
    }
  }
}

#if __has_builtin(__builtin_shufflevector)  // g++ 12, clang
// One stage of the transposition of a square of registers: swaps the blocks of kHalf x kHalf off
// the diagonal in every block of 2 kHalf x 2 kHalf.
template <int kHalf, typename Vector, size_t... kLane>
FASTUNLEARN_INLINE void swap_blocks(Vector* rows, std::index_sequence<kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const Vector a = rows[i], b = rows[i + kHalf];
    rows[i] = __builtin_shufflevector(a, b, (kLane & kHalf ? kLane - kHalf + kLanes : kLane)...);
    rows[i + kHalf] =
        __builtin_shufflevector(a, b, (kLane & kHalf ? kLane + kLanes : kLane + kHalf)...);
  }
  if constexpr (kHalf > 1) {
    swap_blocks<kHalf / 2>(rows, std::make_index_sequence<kLanes>());
  }
}

template <typename Vector, int kLanes>
FASTUNLEARN_INLINE void transpose_square(Vector (&rows)[kLanes]) {
  swap_blocks<kLanes / 2>(rows, std::make_index_sequence<kLanes>());
}
#else
template <typename Vector, int kLanes>
FASTUNLEARN_INLINE void transpose_square(Vector (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const auto value = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = value;
    }
  }
}
#endif

template <typename T>
FASTUNLEARN_INLINE void transpose(const T* from, int64_t from_stride, int rows, int columns,
                                  bool add, T* to, int64_t to_stride) {
  using Vector = typename VectorOf<T>::type;
  using Unaligned = typename VectorOf<T>::unaligned;
  constexpr int kLanes = VectorOf<T>::kLanes;
  for (int i = 0; i < rows; i += kLanes) {
    for (int j = 0; j < columns; j += kLanes) {
      if (i + kLanes <= rows && j + kLanes <= columns) {
        Vector block[kLanes];
        for (int k = 0; k < kLanes; ++k)
          block[k] = *reinterpret_cast<const Unaligned*>(from + (i + k) * from_stride + j);
        transpose_square(block);
        for (int k = 0; k < kLanes; ++k) {
          auto* target = reinterpret_cast<Unaligned*>(to + (j + k) * to_stride + i);
          *target = add ? *target + block[k] : block[k];
        }
        continue;
      }
      for (int c = j; c < std::min(columns, j + kLanes); ++c) {
        T* target = to + c * to_stride;
        for (int r = i; r < std::min(rows, i + kLanes); ++r) {
          const T value = from[r * from_stride + c];
          target[r] = add ? target[r] + value : value;
        }
      }
    }
  }
}

}  // namespace

// Versions of one function of which the loader picks the best: FASTUNLEARN_CPU_CLONES with another
// block in each, so that it fills the registers and no more.
#define FASTUNLEARN_SQUARES(attribute, T, block_rows, bytes)                                       \
  attribute void square_products_version(const T* lanes, const T* const* rows, const int* offsets, \
                                         int64_t step, int positions, int samples, bool half,      \
                                         T* squares) {                                             \
    square_products<block_rows, bytes>(lanes, rows, offsets, step, positions, samples, half,       \
                                       squares);                                                   \
  }                                                                                                \
  attribute void square_group_version(const T* grads, const T* const* taps, const int* offsets,    \
                                      int positions, T* squares) {                                 \
    square_group<bytes>(grads, taps, offsets, positions, squares);                                 \
  }
#ifdef FASTUNLEARN_CPU_VERSIONS
FASTUNLEARN_SQUARES(__attribute__((target("arch=x86-64-v4"))), float, 6, 64)
FASTUNLEARN_SQUARES(__attribute__((target("arch=x86-64-v4"))), double, 6, 64)
FASTUNLEARN_SQUARES(__attribute__((target("arch=x86-64-v3"))), float, 3, 32)
FASTUNLEARN_SQUARES(__attribute__((target("arch=x86-64-v3"))), double, 3, 32)
FASTUNLEARN_SQUARES(__attribute__((target("default"))), float, 3, 16)
FASTUNLEARN_SQUARES(__attribute__((target("default"))), double, 3, 16)
#else
FASTUNLEARN_SQUARES(, float, 3, 16)
FASTUNLEARN_SQUARES(, double, 3, 16)
#endif
#undef FASTUNLEARN_SQUARES

void square_products_cpu(const float* lanes, const float* const* rows, const int* offsets,
                         int64_t step, int positions, int samples, bool half, float* squares) {
  square_products_version(lanes, rows, offsets, step, positions, samples, half, squares);
}

void square_products_cpu(const double* lanes, const double* const* rows, const int* offsets,
                         int64_t step, int positions, int samples, bool half, double* squares) {
  square_products_version(lanes, rows, offsets, step, positions, samples, half, squares);
}

void square_group_cpu(const float* grads, const float* const* taps, const int* offsets,
                      int positions, float* squares) {
  square_group_version(grads, taps, offsets, positions, squares);
}

void square_group_cpu(const double* grads, const double* const* taps, const int* offsets,
                      int positions, double* squares) {
  square_group_version(grads, taps, offsets, positions, squares);
}

FASTUNLEARN_CPU_CLONES
void transpose_cpu(const float* from, int64_t from_stride, int rows, int columns, bool add,
                   float* to, int64_t to_stride) {
  transpose(from, from_stride, rows, columns, add, to, to_stride);
}

FASTUNLEARN_CPU_CLONES
void transpose_cpu(const double* from, int64_t from_stride, int rows, int columns, bool add,
                   double* to, int64_t to_stride) {
  transpose(from, from_stride, rows, columns, add, to, to_stride);
}

}  // namespace fastunlearn
