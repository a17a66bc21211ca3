// Lanes of one warp swap through shared memory. -DFIXED: __syncwarp of the whole warp between write
// and read. -DHALVES: each half of the warp synchronises with itself only. Otherwise: nothing.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void swap_kernel(int* out) {
  __shared__ int tile[warpSize];
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = lane * lane;
#if defined(FIXED)
  __syncwarp();
#elif defined(HALVES)
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
#endif
  out[lane] = tile[lane ^ 16];
}

int main() {
  int out[warpSize];
  int* pointer = out;
  emulator::launch(1, warpSize, 0, [=] { swap_kernel(pointer); });
  std::printf("swapped %d\n", out[0]);
}
