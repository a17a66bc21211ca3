// What the collectives compute, printed for test_emulator.py to check. The kernels compile with nvcc too, which shows
// that the emulated interface is a subset of the real one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

__global__ void collectives_kernel(int* out) {
  const int i = static_cast<int>(threadIdx.x);
  int* row = out + 16 * i;
  row[0] = __shfl_xor_sync(0xffffffffu, i, 5);
  row[1] = __shfl_down_sync(0xffffffffu, i, 3);
  row[2] = __shfl_up_sync(0xffffffffu, i, 2, 8);
  row[3] = __shfl_sync(0xffffffffu, i, 7);
  row[4] = static_cast<int>(__ballot_sync(0xffffffffu, i % 3 == 0));
  row[5] = __any_sync(0xffffffffu, i == 40);
  row[6] = __all_sync(0xffffffffu, i < 64);
  row[7] = __syncthreads_count(i % 2);
  row[8] = __syncthreads_or(i == 63);
  row[9] = __syncthreads_and(i > 0);
  row[10] = i < 16 ? __shfl_xor_sync(0x0000ffffu, i, 1) : -1;
  __shared__ unsigned total;
  if (i == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, static_cast<unsigned>(i));
  __syncthreads();
  row[11] = static_cast<int>(total);
  row[12] = __popc(0xf0f0u) + __ffs(8) + __clz(1);
  row[13] = static_cast<int>(__shfl_xor_sync(0xffffffffu, 0.5 * i, 1) * 2);
}

__global__ void convert_kernel(const float* in, float* bf16, float* fp16) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  bf16[i] = __bfloat162float(__float2bfloat16(in[i]));
  fp16[i] = __half2float(__float2half(in[i]));
}

#ifdef FASTUNLEARN_EMULATED
int main() {
  static int out[64 * 16];
  emulator::launch(1, 64, 0, [] { collectives_kernel(out); });
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 14; ++j) std::printf("%d ", out[16 * i + j]);
    std::printf("\n");
  }
  static float in[65536], bf16[65536], fp16[65536];
  for (uint32_t i = 0; i < 65536; ++i) in[i] = __uint_as_float(i * 65537u);
  emulator::launch(256, 256, 0, [] { convert_kernel(in, bf16, fp16); });
  for (int i = 0; i < 65536; ++i) {
    std::printf("%x %x %x\n", __float_as_uint(in[i]), __float_as_uint(bf16[i]), __float_as_uint(fp16[i]));
  }
  emulator::launch(1, 2048, 0, [] {});
  std::printf("%s\n", cudaGetErrorString(cudaGetLastError()));
}
#endif
