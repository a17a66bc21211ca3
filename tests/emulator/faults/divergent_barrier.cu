// Threads that wait for threads that never come; each of these hangs a GPU or is undefined there.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void divergent_kernel(int* out) {
  const int tid = static_cast<int>(threadIdx.x);
  int value = tid;
#if defined(BARRIER_AND_SHUFFLE)  // one lane at the block's barrier, its warp at a shuffle
  if (tid == 7) {
    __syncthreads();
  } else {
    value = __shfl_xor_sync(0xffffffffu, tid, 1);
  }
#elif defined(TWO_BARRIERS)     // every thread at a barrier, but not at the same one
  if (tid < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
#elif defined(TWO_COLLECTIVES)  // a warp at two different collectives
  value = tid < 16 ? __shfl_xor_sync(0xffffffffu, tid, 1) : __any_sync(0xffffffffu, tid);
#elif defined(EXITED_LANE)      // the mask names a thread that has left
  if (tid == 3) return;
  value = __shfl_xor_sync(0xffffffffu, tid, 1);
#elif defined(NOT_IN_MASK)      // the mask does not name the caller
  value = __shfl_xor_sync(0x0000ffffu, tid, 1);
#endif
  __syncthreads();
  out[tid] = value;
}

int main() {
  int out[64];
  int* pointer = out;
  emulator::launch(dim3(1, 2), 64, 0, [=] { divergent_kernel(pointer); });
  std::printf("done %d\n", out[63]);
}
