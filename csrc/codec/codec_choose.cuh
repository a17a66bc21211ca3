// codec_choose_: one block per row joins a feature to the distances and finds the row's nearest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

namespace fastunlearn {

inline constexpr int kChooseThreads = 256;
inline constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

template <typename Scalar>
struct CodecChooseParams {
  Scalar* distances;     // [rows, rows]
  int32_t* rank_terms;   // [2, rows]
  const Scalar* column;  // [rows]
  int64_t rows;
};

namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

template <typename Scalar>
struct Nearest {
  Scalar distance;
  int32_t row;

  // Of equally near rows the lowest, whatever the order of the comparisons.
  __device__ __forceinline__ void take(Scalar other_distance, int32_t other_row) {
    if (other_distance < distance || (other_distance == distance && other_row < row)) {
      distance = other_distance;
      row = other_row;
    }
  }
};

template <typename Scalar>
__global__ void __launch_bounds__(kChooseThreads)
    codec_choose_kernel(const __grid_constant__ CodecChooseParams<Scalar> params) {
  __shared__ Nearest<Scalar> warps[kChooseThreads / 32];
  const int64_t i = blockIdx.x;
  const Scalar here = params.column[i];
  Scalar* distances = params.distances + i * params.rows;
  Nearest<Scalar> nearest{std::numeric_limits<Scalar>::infinity(), kNobody};
  for (int64_t j = threadIdx.x; j < params.rows; j += kChooseThreads) {
    const Scalar difference = params.column[j] - here;
    const Scalar joined = distances[j] + difference * difference;
    distances[j] = joined;
    if (j != i && joined < nearest.distance) nearest = {joined, static_cast<int32_t>(j)};
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Scalar distance = __shfl_xor_sync(0xffffffffu, nearest.distance, offset);
    const int32_t row = __shfl_xor_sync(0xffffffffu, nearest.row, offset);
    nearest.take(distance, row);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = nearest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kChooseThreads / 32; ++warp)
    nearest.take(warps[warp].distance, warps[warp].row);
  const int32_t rank = params.rank_terms[i];
  params.rank_terms[params.rows + i] =
      nearest.row == kNobody ? 0 : min(rank, params.rank_terms[nearest.row]);
}

}  // namespace
}  // namespace fastunlearn
