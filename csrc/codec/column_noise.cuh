// add_column_noise_: a thread adds four rows of one column, what one Philox counter gives.
#pragma once

#include <cuda_runtime.h>

#include "common/philox.h"

namespace fastunlearn {

inline constexpr int kNoiseThreads = 256;

template <typename Scalar>
struct ColumnNoiseParams {
  Scalar* values;        // [rows, columns]
  const Scalar* scales;  // [columns]
  int64_t rows, columns;
  uint64_t seed;
};

namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

template <typename Scalar>
__global__ void __launch_bounds__(kNoiseThreads)
    column_noise_kernel(const __grid_constant__ ColumnNoiseParams<Scalar> params) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x;
  const int64_t block = at / params.columns, column = at % params.columns;
  if (4 * block >= params.rows) return;
  const NormalBlock normal =
      normal_block(params.seed, static_cast<uint64_t>(block), static_cast<uint64_t>(column));
  const Scalar scale = params.scales[column];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (4 * block + r >= params.rows) break;
    Scalar& value = params.values[(4 * block + r) * params.columns + column];
    value = fused(scale, static_cast<Scalar>(normal.value[r]), value);
  }
}

}  // namespace
}  // namespace fastunlearn
