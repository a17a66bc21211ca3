// What the wrappers of csrc/common/hopper.cuh mean, printed for tests/test_emulator_hopper.py. The
// same file compiles with nvcc for sm_90a.
#include <cudaTypedefs.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/hopper.cuh"
#include "common/scalar.cuh"
#include "common/shared_memory.cuh"

namespace fastunlearn {
namespace {

// A tensor [2, 9, 72] whose boxes are [1, 16, 64]. Element (z, y, x) is a small integer.
constexpr int kX = 72, kY = 9, kZ = 2, kRows = 16, kPanel = kRows * 128;
float value(int z, int y, int x) { return static_cast<float>((5 * x + 11 * y + 29 * z) % 37 - 18); }

template <typename T>
__device__ __forceinline__ T* align_1024(T* pointer) {
  return pointer + (1024 - shared_address(pointer) % 1024) % 1024;
}

// Every thread arrives twice, then the box at (x, y, z) comes; shown as it lies in shared memory.
__global__ void copy_kernel(const __grid_constant__ CUtensorMap map, int x, int y, int z,
                            unsigned short* out) {
  unsigned char* shared = align_1024(dynamic_shared<unsigned char>());
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + kPanel);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, blockDim.x);
    mbarrier_init_fence();
  }
  __syncthreads();
  mbarrier_wait(barrier, 1);  // the phase before the first
  mbarrier_arrive(barrier, 0);
  mbarrier_wait(barrier, 0);
  if (threadIdx.x == 5) {
    copy_tensor_3d(shared, &map, barrier, x, y, z);  // may come before it is announced
    mbarrier_arrive_expect(barrier, kPanel);
  } else {
    mbarrier_arrive(barrier, 0);
  }
  mbarrier_wait(barrier, 1);
  for (int i = threadIdx.x; i < kPanel / 2; i += blockDim.x)
    out[i] = reinterpret_cast<const unsigned short*>(shared)[i];
}

// Each block of a cluster copies half a box's rows into both, and arrives at both barriers.
__global__ void multicast_kernel(const __grid_constant__ CUtensorMap map, unsigned short* out) {
  unsigned char* shared = align_1024(dynamic_shared<unsigned char>());
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 2 * kPanel);
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 3);
    mbarrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 2 * kPanel);
    multicast_tensor_3d(shared + rank * kPanel, &map, barrier, 0, 0, static_cast<int>(rank), 0b11);
    mbarrier_arrive(barrier, 0);
    mbarrier_arrive(barrier, 1);
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kPanel; i += blockDim.x)
    out[blockIdx.x * kPanel + i] = reinterpret_cast<const unsigned short*>(shared)[i];
  cluster_sync();
}

// d = 1 + 2 A^T B over 16 positions of panels of 64 features: A is panel 0, B the first kColumns.
template <typename Scalar, int kColumns>
__global__ void __launch_bounds__(128, 1)
    product_kernel(const __grid_constant__ CUtensorMap map, float* out) {
  unsigned char* shared = align_1024(dynamic_shared<unsigned char>());
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + kColumns / 64 * kPanel);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, kColumns / 64 * kPanel);
    for (int i = 0; i < kColumns / 64; ++i)
      copy_tensor_3d(shared + i * kPanel, &map, barrier, 3 * i, 0, i % 2);
  }
  mbarrier_wait(barrier, 0);
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 1;
  const uint64_t a = wgmma_descriptor(shared, kPanel), b = wgmma_descriptor(shared, kPanel);
  wgmma_fence();
  wgmma<Scalar, kColumns>(d, a, b, true);
  wgmma<Scalar, kColumns>(d, a, b, true);
  wgmma_commit();
  wgmma_wait_all(d);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    out[wgmma_row(static_cast<int>(threadIdx.x), i) * kColumns +
        wgmma_column(static_cast<int>(threadIdx.x), i)] = d[i];
  }
}

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &found);
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

struct Wanted {
  cuuint64_t size = kX, stride = 2 * kX;
  cuuint32_t box = 64, rows = kRows;
  int offset = 0;  // bytes
};
CUresult encode(CUtensorMap& map, void* data, CUtensorMapDataType type, const Wanted& wanted) {
  const cuuint64_t sizes[] = {wanted.size, kY, kZ}, strides[] = {wanted.stride, 2 * kX * kY};
  const cuuint32_t box[] = {wanted.box, wanted.rows, 1}, steps[] = {1, 1, 1};
  return encoder()(&map, type, 3, static_cast<char*>(data) + wanted.offset, sizes, strides, box,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <typename Scalar>
struct Values {
  static constexpr auto kType = std::is_same_v<Scalar, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  void* data = nullptr;
  CUtensorMap map;
  Values() {
    std::vector<Scalar> host;
    for (int z = 0; z < kZ; ++z)
      for (int y = 0; y < kY; ++y)
        for (int x = 0; x < kX; ++x) host.push_back(narrow<Scalar>(value(z, y, x)));
    cudaMalloc(&data, 2 * host.size());
    cudaMemcpyAsync(data, host.data(), 2 * host.size(), cudaMemcpyHostToDevice, nullptr);
    if (encode(map, data, kType, {}) != CUDA_SUCCESS) std::exit(1);
  }
  ~Values() { cudaFree(data); }
};

template <typename T, typename Launch>
void show(const char* name, size_t count, const Launch& launch) {
  T* out = nullptr;
  cudaMalloc(&out, count * sizeof(T));
  launch(out);
  std::vector<T> host(count);
  cudaMemcpyAsync(host.data(), out, count * sizeof(T), cudaMemcpyDeviceToHost, nullptr);
  cudaStreamSynchronize(nullptr);
  std::printf("%s", name);
  for (T element : host) std::printf(" %d", static_cast<int>(element));
  std::printf("\n");
  cudaFree(out);
}

template <typename... Params, typename... Args>
void run(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t bytes,
         unsigned cluster, Args... args) {
#ifdef FASTUNLEARN_EMULATED
  emulator::launch(blocks, threads, bytes, [=] { kernel(args...); }, cluster);
#else
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, args...);
#endif
}

template <typename Scalar, int kColumns>
void product(const char* name) {
  const Values<Scalar> values;
  show<float>(name, 64 * kColumns, [&](float* out) {
    run(product_kernel<Scalar, kColumns>, 1, 128, 1024 + kColumns / 64 * kPanel + 8, 1, values.map,
        out);
  });
}

void show_all() {
  const Values<__half> values;
  const int origins[][3] = {{0, 0, 0}, {8, 0, 1}, {64, 3, 0}, {-8, -2, 1}, {80, 0, 0}, {0, 0, 2}};
  for (const auto& o : origins) {
    show<unsigned short>("copy", kPanel / 2, [&](unsigned short* out) {
      run(copy_kernel, 1, 32, 1024 + kPanel + 8, 1, values.map, o[0], o[1], o[2], out);
    });
  }
  show<unsigned short>("multicast", 4 * kPanel, [&](unsigned short* out) {
    run(multicast_kernel, 4, 64, 1024 + 2 * kPanel + 8, 2, values.map, out);
  });
  product<__nv_bfloat16, 128>("product_bf16_128");
  product<__nv_bfloat16, 192>("product_bf16_192");
  product<__nv_bfloat16, 256>("product_bf16_256");
  product<__half, 128>("product_fp16_128");
  product<__half, 192>("product_fp16_192");
  product<__half, 256>("product_fp16_256");
  CUtensorMap map;
  const auto type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  std::printf(
      "refused %d %d %d %d %d\n", encode(map, values.data, type, {.stride = 2 * kX + 8}),
      encode(map, values.data, type, {.offset = 8}), encode(map, values.data, type, {.box = 72}),
      encode(map, values.data, type, {.rows = 257}), encode(map, values.data, type, {.size = 0}));
}

}  // namespace
}  // namespace fastunlearn

int main() { fastunlearn::show_all(); }
