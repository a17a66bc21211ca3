// One block per matrix; k is a few hundred at most, so the matrices stay in L2.
#pragma once

#include <cuda_runtime.h>

#include "subspace/cholesky.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

__global__ void __launch_bounds__(kCholeskyThreads) cholesky_kernel(CholeskyParams params) {
  const int k = static_cast<int>(params.size);
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * k * k;
  double* gram = params.grams + offset;
  double* inverse = params.inverses + offset;
  const int thread = static_cast<int>(threadIdx.x);
  int rank = 0;
  bool finite = true;
  for (int j = 0; j < k; ++j) finite = finite && isfinite(gram[j * k + j]);
  __syncthreads();  // everyone has read the diagonal before it changes

  // Right-looking. The inverse's diagonal keeps the original G_jj until column j's turn.
  for (int i = thread; i < k * k; i += kCholeskyThreads) {
    const int row = i / k, column = i % k;
    inverse[i] = row == column ? gram[i] : 0;
    if (row > column) gram[i] = 0;
  }
  __syncthreads();
  for (int j = 0; j < k; ++j) {
    const double left = gram[j * k + j];
    const bool keep = finite && left > params.tolerance * inverse[j * k + j];
    const double scale = keep ? 1 / sqrt(left) : 0;
    rank += keep;
    __syncthreads();  // all threads have read the pivot
    for (int c = j + thread; c < k; c += kCholeskyThreads) {
      gram[j * k + c] = keep ? gram[j * k + c] * scale : 0;
    }
    if (thread == 0) inverse[j * k + j] = scale;
    __syncthreads();
    const int rest = k - j - 1;
    for (int i = thread; keep && i < rest * rest; i += kCholeskyThreads) {
      const int row = j + 1 + i / rest, column = j + 1 + i % rest;
      if (column >= row) gram[row * k + column] -= gram[j * k + row] * gram[j * k + column];
    }
    __syncthreads();
  }
  // R X = I by back substitution, one column of X per thread.
  for (int column = thread; column < k; column += kCholeskyThreads) {
    if (inverse[column * k + column] == 0) continue;
    for (int row = column - 1; row >= 0; --row) {
      double sum = 0;
      for (int i = row + 1; i <= column; ++i) sum += gram[row * k + i] * inverse[i * k + column];
      inverse[row * k + column] = -sum * inverse[row * k + row];
    }
  }
  if (thread == 0) params.ranks[blockIdx.x] = finite ? rank : -1;
}

}  // namespace
}  // namespace fastunlearn
