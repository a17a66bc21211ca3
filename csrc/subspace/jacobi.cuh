// One block per matrix, in shared memory where it fits.
#pragma once

#include "common/reduce.cuh"
#include "common/shared_memory.cuh"
#include "subspace/jacobi.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

template <typename T, bool kShared>
__global__ void __launch_bounds__(32 * kMaxWarps) jacobi_kernel(JacobiParams params) {
  __shared__ int rotated[kMaxWarps];
  const int k = params.size;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * k * k;
  T* const rows_out = static_cast<T*>(params.rows) + offset;
  T* const rotation_out = params.rotation ? static_cast<T*>(params.rotation) + offset : nullptr;
  T* rows = rows_out;
  T* rotation = rotation_out;
  if constexpr (kShared) {
    rows = dynamic_shared<T>();
    if (rotation) rotation = rows + k * k;
    for (int i = threadIdx.x; i < k * k; i += blockDim.x) {
      rows[i] = rows_out[i];
      if (rotation) rotation[i] = i / k == i % k ? T(1) : T(0);
    }
  } else if (rotation) {
    for (int i = threadIdx.x; i < k * k; i += blockDim.x)
      rotation[i] = i / k == i % k ? T(1) : T(0);
  }
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  const int players = k + k % 2;
  auto rotate = [&](T* a, T* b, T cosine, T sine) {
    for (int i = lane; i < k; i += 32) {
      const T x = a[i], y = b[i];
      a[i] = cosine * x - sine * y;
      b[i] = sine * x + cosine * y;
    }
  };
  int sweep = 0;
  for (bool again = k > 1; again && sweep < kMaxSweeps; ++sweep) {
    const T tolerance = jacobi_tolerance<T>(sweep);
    int turned = 0;
    for (int round = 0; round < players - 1; ++round) {
      for (int index = warp; index < players / 2; index += warps) {
        const RowPair pair = tournament_pair(round, index, players);
        if (pair.second >= k) continue;
        T* a = rows + pair.first * k;
        T* b = rows + pair.second * k;
        T aa = 0, bb = 0, ab = 0;
        for (int i = lane; i < k; i += 32) {
          aa += a[i] * a[i];
          bb += b[i] * b[i];
          ab += a[i] * b[i];
        }
        aa = warp_sum(aa);
        bb = warp_sum(bb);
        ab = warp_sum(ab);
        if (!(fabs(ab) > tolerance * sqrt(aa) * sqrt(bb))) continue;
        turned = 1;
        const T zeta = (bb - aa) / (2 * ab);
        const T tangent = copysign(T(1), zeta) / (fabs(zeta) + sqrt(1 + zeta * zeta));
        const T cosine = 1 / sqrt(1 + tangent * tangent);
        rotate(a, b, cosine, cosine * tangent);
        if (rotation)
          rotate(rotation + pair.first * k, rotation + pair.second * k, cosine, cosine * tangent);
      }
      __syncthreads();
    }
    if (lane == 0) rotated[warp] = turned;
    __syncthreads();
    again = false;
    for (int w = 0; w < warps; ++w) again = again || rotated[w];
    __syncthreads();  // everyone has read the flags before the next sweep writes them
    if (again && sweep + 1 == kMaxSweeps) sweep = kMaxSweeps;
  }
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < k * k; i += blockDim.x) {
      rows_out[i] = rows[i];
      if (rotation) rotation_out[i] = rotation[i];
    }
  }
  if (threadIdx.x == 0) params.sweeps[blockIdx.x] = sweep > kMaxSweeps ? -1 : sweep;
}

}  // namespace
}  // namespace fastunlearn
