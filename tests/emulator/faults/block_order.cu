// Every block overwrites one word: the winner depends on an order that CUDA does not promise.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void last_writer_kernel(unsigned* out) { *out = blockIdx.x; }

int main() {
  unsigned out = 0;
  emulator::launch(4, 1, 0, [&] { last_writer_kernel(&out); });
  std::printf("%u\n", out);
}
