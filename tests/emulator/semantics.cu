// What the emulated names mean, printed for tests/test_emulator.py to check. The same file compiles
// with nvcc: emulated CUDA is a subset of CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

namespace {

constexpr int kThreads = 64;

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t bytes, Args... args) {
#ifdef FASTUNLEARN_EMULATED
  emulator::launch(grid, block, bytes, [=] { kernel(args...); });
#else
  kernel<<<grid, block, bytes>>>(args...);
#endif
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef FASTUNLEARN_EMULATED
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

template <typename T>
__global__ void __launch_bounds__(kThreads) shuffle_kernel(long long* __restrict__ out) {
  const int tid = threadIdx.x;
  const T value = static_cast<T>(100 * tid + 7);
  out[0 * kThreads + tid] = static_cast<long long>(__shfl_sync(0xffffffffu, value, tid + 3, 8));
  out[1 * kThreads + tid] = static_cast<long long>(__shfl_sync(0xffffffffu, value, 5));
  out[2 * kThreads + tid] = static_cast<long long>(__shfl_up_sync(0xffffffffu, value, 3, 16));
  out[3 * kThreads + tid] = static_cast<long long>(__shfl_down_sync(0xffffffffu, value, 5));
  out[4 * kThreads + tid] = static_cast<long long>(__shfl_down_sync(0xffffffffu, value, 2, 4));
  out[5 * kThreads + tid] = static_cast<long long>(__shfl_xor_sync(0xffffffffu, value, 9, 8));
}

// The two halves of each warp vote apart, at the same time.
__global__ void vote_kernel(unsigned* out) {
  const int tid = threadIdx.x, lane = tid % warpSize;
  if (lane < 20) {
    out[tid] = __ballot_sync(0x000fffffu, tid % 3 == 0);
  } else {
    out[tid] = __ballot_sync(0xfff00000u, tid % 2);
  }
  __syncwarp();
  out[kThreads + tid] = __any_sync(0xffffffffu, tid == 40) * 2 + __all_sync(0xffffffffu, tid < 40);
  out[2 * kThreads + tid] = __syncthreads_count(tid % 5 == 0);
  out[3 * kThreads + tid] = __syncthreads_or(tid == 63) * 2 + __syncthreads_and(tid != 63);
}

// Threads from 40 on leave; the others still meet. Blocks and threads are three-dimensional.
__global__ void barrier_kernel(unsigned* out) {
  __shared__ unsigned tile[kThreads];
  const unsigned tid = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (tid >= 40) return;
  tile[tid] = 1000 * block + tid;
  __syncthreads();
  unsigned sum = tile[(tid + 1) % 40];
  __syncthreads();
  tile[tid] = sum + 1;
  __syncthreads();
  out[40 * block + tid] = tile[39 - tid];
}

__global__ void dynamic_shared_kernel(unsigned* out) {
  unsigned* tile = dynamic_shared<unsigned>();
  const unsigned tid = threadIdx.x;
  out[tid] = tile[tid];  // never written: whatever a GPU has there, poison here
  __syncthreads();
  tile[tid] = tid * tid;
  __syncthreads();
  out[kThreads + tid] = tile[kThreads - 1 - tid];
}

struct Totals {
  int add;
  unsigned add_unsigned, bit_or, bit_and, most, least, exchanged, lock;
  unsigned long long add_wide;
  float add_float;
  double add_double;
};

__global__ void atomic_kernel(Totals* totals) {
  const unsigned tid = threadIdx.x;
  atomicAdd(&totals->add, -static_cast<int>(tid));
  atomicAdd(&totals->add_unsigned, tid);
  atomicAdd(&totals->add_wide, 1ull << 33);
  atomicAdd(&totals->add_float, 0.5f);
  atomicAdd(&totals->add_double, 0.25);
  atomicOr(&totals->bit_or, 1u << tid % 8);
  atomicAnd(&totals->bit_and, ~(1u << tid % 4));
  atomicMax(&totals->most, tid);
  atomicMin(&totals->least, 1000 - tid);
  atomicExch(&totals->exchanged, 9u);
  if (atomicCAS(&totals->lock, 0u, 77u) == 0u) __threadfence();
}

__global__ void intrinsic_kernel(unsigned* out, float x, unsigned n) {
  const float4 four = make_float4(x, x, x, x);
  out[0] = __popc(n);
  out[1] = __popcll(~0ull << 3);
  out[2] = __ffs(static_cast<int>(n));
  out[3] = __clz(static_cast<int>(n));
  out[4] = __brev(n);
  out[5] = __float_as_uint(four.w);
  out[6] = __umulhi(n, 0xdeadbeefu);
  out[7] = __float_as_uint(__fmaf_rn(x, x, -__fmul_rn(x, x)));  // the rounding error of x * x
  out[8] = __float_as_uint(__fadd_rn(x, __uint_as_float(n)));
  out[9] = __ldg(out);
  out[10] = min(3, -4) + max(5, 2) + static_cast<int>(min(1.5f, x) + max(2.5, 1.0));
  out[11] = __float_as_uint(fmaf(x, 3.0f, 1.0f));
  out[12] = __float_as_uint(__bfloat162float(__float2bfloat16(x)));
  out[13] = __float_as_uint(__half2float(__float2half(x)));
}

// A buffer that prints itself.
template <typename T>
struct Buffer {
  explicit Buffer(size_t count) : count(count) {
    cudaMalloc(&data, count * sizeof(T));
    cudaMemsetAsync(data, 0, count * sizeof(T), nullptr);
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  std::vector<T> read() const {
    std::vector<T> host(count);
    cudaMemcpyAsync(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost, nullptr);
    cudaStreamSynchronize(nullptr);
    return host;
  }
  void print(const char* name) const {
    std::printf("%s", name);
    for (T value : read()) std::printf(" %lld", static_cast<long long>(value));
    std::printf("\n");
  }
  T* data = nullptr;
  size_t count;
};

template <typename T>
void shuffle(const char* name) {
  Buffer<long long> out(6 * kThreads);
  launch(shuffle_kernel<T>, 1, kThreads, 0, out.data);
  out.print(name);
}

void refuse(const char* name, dim3 grid, dim3 block, size_t bytes) {
  Buffer<unsigned> out(1);
  launch(vote_kernel, grid, block, bytes, out.data);
  const cudaError_t peeked = cudaPeekAtLastError();
  const cudaError_t got = cudaGetLastError();
  std::printf("%s %d %d %d\n", name, static_cast<int>(peeked), static_cast<int>(got),
              static_cast<int>(cudaGetLastError()));
}

}  // namespace

int main() {
  shuffle<int>("shuffle_int");
  shuffle<unsigned>("shuffle_unsigned");
  shuffle<float>("shuffle_float");
  shuffle<double>("shuffle_double");
  shuffle<long long>("shuffle_long_long");
  shuffle<unsigned long long>("shuffle_unsigned_long_long");
  {
    Buffer<unsigned> out(4 * kThreads);
    launch(vote_kernel, 1, kThreads, 0, out.data);
    out.print("vote");
  }
  {
    Buffer<unsigned> out(40 * 12);
    launch(barrier_kernel, dim3(2, 3, 2), dim3(4, 4, 4), 0, out.data);
    out.print("barrier");
  }
  {
    Buffer<unsigned> out(2 * kThreads);
    launch(dynamic_shared_kernel, 1, kThreads, kThreads * sizeof(unsigned), out.data);
    out.print("dynamic_shared");
  }
  {
    Buffer<Totals> out(1);
    Totals start = {};
    start.bit_and = start.least = ~0u;
    cudaMemcpyAsync(out.data, &start, sizeof start, cudaMemcpyHostToDevice, nullptr);
    launch(atomic_kernel, 2, kThreads, 0, out.data);
    const Totals t = out.read()[0];
    std::printf("atomic %d %u %u %u %u %u %u %u %llu %g %g\n", t.add, t.add_unsigned, t.bit_or,
                t.bit_and, t.most, t.least, t.exchanged, t.lock, t.add_wide, t.add_float,
                t.add_double);
  }
  {
    Buffer<unsigned> out(14);
    launch(intrinsic_kernel, 1, 1, 0, out.data, 1.1f, 0x00345678u);
    out.print("intrinsic");
  }
  refuse("refuse_zero_grid", dim3(0), dim3(32), 0);
  refuse("refuse_zero_block", dim3(1), dim3(32, 0), 0);
  refuse("refuse_large_block", dim3(1), dim3(32, 33), 0);
  refuse("refuse_tall_grid", dim3(1, 65536), dim3(32), 0);
  refuse("refuse_deep_grid", dim3(1, 1, 65536), dim3(32), 0);
  refuse("refuse_shared_bytes", dim3(1), dim3(32), 232449);
  return cudaFuncSetAttribute(vote_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024) ==
                 cudaSuccess
             ? 0
             : 1;
}
