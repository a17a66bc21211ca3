// Lanes exchange through shared memory. Without -DFIXED nothing orders the store of one lane and the load of the next.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void rotate_kernel(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
#ifdef FIXED
  __syncwarp();
#endif
  out[threadIdx.x] = values[(threadIdx.x + 1) % 32];
}

int main() {
  int out[32];
  emulator::launch(1, 32, 0, [&] { rotate_kernel(out); });
  std::printf("%d\n", out[0]);
}
