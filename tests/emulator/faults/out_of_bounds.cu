// Reads one element too far: past a shared tile, past dynamic shared memory, or past global memory.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#ifdef FIXED
#define BEYOND(place) 0u
#else
#define BEYOND(place) (FAULT == place ? 1u : 0u)
#endif
enum { SHARED, DYNAMIC, GLOBAL };

__global__ void copy_kernel(const float* in, float* out) {
  __shared__ float tile[64];
  float* dynamic = static_cast<float*>(emulator::dynamic_shared());
  tile[threadIdx.x] = dynamic[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + BEYOND(SHARED)] + dynamic[threadIdx.x + BEYOND(DYNAMIC)] +
                     in[threadIdx.x + BEYOND(GLOBAL)];
}

int main() {
  std::vector<float> in(64, 1.0f), out(64);
  emulator::launch(1, 64, 64 * sizeof(float), [&] { copy_kernel(in.data(), out.data()); });
  std::printf("%g\n", static_cast<double>(out[63]));
}
