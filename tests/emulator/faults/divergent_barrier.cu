// Half a warp waits for the block while the other half waits for the warp: on a GPU this hangs.
#include <cuda_runtime.h>

__global__ void divergent_kernel() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

int main() {
  emulator::launch(dim3(2), dim3(64), 0, [] { divergent_kernel(); });
}
