// Sums 64 numbers in shared memory, then hands the sum to everyone. Two barriers belong here; with
// -DFIXED both are there, with -DREDUCTION or -DBROADCAST the one of that name is missing.
#include <cuda_runtime.h>

#include <cstdio>

constexpr unsigned kThreads = 64;

__global__ void sum_kernel(int* out) {
  __shared__ int tile[kThreads];
  const unsigned tid = threadIdx.x;
  tile[tid] = static_cast<int>(tid);
  __syncthreads();
  for (unsigned stride = kThreads / 2; stride > 0; stride /= 2) {
    if (tid < stride) tile[tid] += tile[tid + stride];
#ifndef REDUCTION
    __syncthreads();
#endif
  }
  __syncthreads();
  // Thread 0 writes, and is at the last barrier before the others have left the one above: a
  // scheduler with one clock for all barriers would hide this race from ThreadSanitizer.
  if (tid == 0) tile[1] = tile[0];
#ifndef BROADCAST
  __syncthreads();
#endif
  out[tid] = tile[1];
  __syncthreads();
}

int main() {
  int out[kThreads];
  int* pointer = out;
  for (int repeat = 0; repeat < 2; ++repeat) {
    emulator::launch(1, kThreads, 0, [=] { sum_kernel(pointer); });
  }
  std::printf("sum %d\n", out[kThreads - 1]);
}
