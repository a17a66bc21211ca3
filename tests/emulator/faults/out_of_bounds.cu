// Reads one element past the end: -DSHARED of a shared tile, -DDYNAMIC of dynamic shared memory,
// -DGLOBAL of a buffer, -DSTACK overflows a thread's stack; with none of them, stays inside.
#include <cuda_runtime.h>

#include <cstdio>

constexpr int kThreads = 32;

#if defined(SHARED)
constexpr int kShared = 1, kDynamic = 0, kGlobal = 0;
#elif defined(DYNAMIC)
constexpr int kShared = 0, kDynamic = 1, kGlobal = 0;
#elif defined(GLOBAL)
constexpr int kShared = 0, kDynamic = 0, kGlobal = 1;
#else
constexpr int kShared = 0, kDynamic = 0, kGlobal = 0;
#endif

// An unnamed namespace: g++ puts no red zones around the statics of templates that other
// translation units could instantiate too.
namespace {

// Through a pointer, where no array type is left to check against.
__device__ __attribute__((noinline)) float read(const float* tile, int i) { return tile[i]; }

template <int N>
__global__ void past_the_end_kernel(float* out, const float* in) {
  __shared__ float tile[N];
  float* dynamic = static_cast<float*>(emulator::dynamic_shared());
  const int tid = static_cast<int>(threadIdx.x);
  tile[tid] = dynamic[tid] = in[tid];
  __syncthreads();
  out[tid] = read(tile, tid + kShared) + read(dynamic, tid + kDynamic) + read(in, tid + kGlobal);
}

#ifdef STACK
__attribute__((noinline)) int descend(int levels, volatile int* above) {
  volatile int frame[256];
  frame[0] = *above + 1;
  return levels == 0 ? frame[0] : descend(levels - 1, frame) + frame[0];
}
#endif

}  // namespace

int main() {
  float *in = nullptr, *out = nullptr;
  cudaMalloc(&in, kThreads * sizeof(float));
  cudaMalloc(&out, kThreads * sizeof(float));
  cudaMemsetAsync(in, 0, kThreads * sizeof(float), nullptr);
  emulator::launch(1, kThreads, kThreads * sizeof(float), [=] {
#ifdef STACK
    volatile int top = 0;
    out[0] = static_cast<float>(descend(1000, &top));
#else
    past_the_end_kernel<kThreads>(out, in);
#endif
  });
  std::printf("sum %g\n", out[0]);
  cudaFree(in);
  cudaFree(out);
}
