// The last writer wins: a race between blocks and one between threads that no sanitizer
// can call a race, because the accesses are atomic. Only the order of execution shows them.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void last_writer_kernel(unsigned* out) {
  atomicExch(&out[0], blockIdx.x);
  atomicExch(&out[1], threadIdx.x);
  atomicAdd(&out[2], threadIdx.x);  // commutes: the same in any order
}

int main() {
  unsigned out[3] = {};
  unsigned* pointer = out;
  emulator::launch(5, 64, 0, [=] { last_writer_kernel(pointer); });
  std::printf("%u %u %u\n", out[0], out[1], out[2]);
}
