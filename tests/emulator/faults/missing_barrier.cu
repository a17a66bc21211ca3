// A shared-memory reduction. Without -DFIXED the barrier after the first store is missing: ThreadSanitizer must say so.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void sum_kernel(const float* in, float* out) {
  __shared__ float partial[128];
  partial[threadIdx.x] = in[threadIdx.x];
#ifdef FIXED
  __syncthreads();
#endif
  for (unsigned half = 64; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = partial[0];
}

int main() {
  float in[128], out = 0;
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  emulator::launch(1, 128, 0, [&] { sum_kernel(in, &out); });
  std::printf("%g\n", static_cast<double>(out));
}
