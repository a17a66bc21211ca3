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
  bool aligned;  // every row begins at a multiple of 16 bytes

  RunOperand(const Scalar* data, int64_t groups, int64_t rows, int64_t columns)
      : data(data),
        groups(groups),
        rows(rows),
        columns(columns),
        aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                columns * static_cast<int64_t>(sizeof(Scalar)) % 16 == 0) {}

  __device__ __forceinline__ const Scalar* matrix(int64_t group, int64_t sample) const {
    return data + (sample * groups + group) * rows * columns;
  }
};

}  // namespace fastunlearn
