// A factor of a product as it lies in memory, for kernels that copy 16 bytes at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastunlearn {

// A matrix [rows, columns] per sample and group, columns contiguous. Columns are features and rows
// positions (Linear), or the other way round (kPositionsContiguous, the planes of an image).
template <typename Scalar_, bool kPositionsContiguous_>
struct RunOperand {
  using Scalar = Scalar_;
  static constexpr bool kPositionsContiguous = kPositionsContiguous_;

  const Scalar* data;
  int64_t groups;
  int64_t rows, columns;
  int alignment;  // every row begins at a multiple of so many bytes, at most 16

  RunOperand(const Scalar* data, int64_t groups, int64_t rows, int64_t columns)
      : data(data), groups(groups), rows(rows), columns(columns), alignment(16) {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(data) | columns * sizeof(Scalar);
    while (bits % alignment != 0) alignment /= 2;
  }

  __device__ __forceinline__ const Scalar* matrix(int64_t group, int64_t sample) const {
    return data + (sample * groups + group) * rows * columns;
  }
};

}  // namespace fastunlearn
