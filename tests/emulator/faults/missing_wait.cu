// A ring of two stages: thread 128 copies 16 positions a time, the first warpgroup multiplies them,
// the first 64 features by all 128. With -DFIXED every wait and fence is there; otherwise the one
// of that name is missing, or a mistake of that name is made.
#include <cudaTypedefs.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/hopper.cuh"
#include "common/shared_memory.cuh"

using namespace fastunlearn;

constexpr int kPositions = 96, kFeatures = 128, kStages = 2, kRows = 16, kPanel = kRows * 128;
constexpr int kStage = 2 * kPanel;
constexpr int kSharedBytes = 1024 + kStages * (kStage + 16);

__global__ void __launch_bounds__(256, 1)
    ring_kernel(const __grid_constant__ CUtensorMap map, float* out) {
  unsigned char* shared = dynamic_shared<unsigned char>();
#if defined(ALIGNMENT)  // 128 bytes are what the copy wants, not what the two swizzles agree on
  shared += (128 - shared_address(shared) % 128) % 128;
#else
  shared += (1024 - shared_address(shared) % 1024) % 1024;
#endif
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * kStage);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
#if defined(ARRIVALS)  // more than come
      mbarrier_init(&empty[i], 5);
#else
      mbarrier_init(&empty[i], 4);
#endif
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x == 128) {
    for (int k = 0; k < kPositions / kRows; ++k) {
      const int i = k % kStages;
#if !defined(EMPTY)  // the stage has been read
      mbarrier_wait(&empty[i], k / kStages % 2 ^ 1);
#endif
#if defined(BYTES)
      mbarrier_arrive_expect(&full[i], kStage + 128);
#else
      mbarrier_arrive_expect(&full[i], kStage);
#endif
      for (int panel = 0; panel < 2; ++panel) {
#if defined(OUTSIDE)
        unsigned char* to = shared + kStages * kStage + i * kStage + panel * kPanel;
#else
        unsigned char* to = shared + i * kStage + panel * kPanel;
#endif
        copy_tensor_3d(to, &map, &full[i], 64 * panel, k * kRows, 0);
      }
    }
  } else if (threadIdx.x < 128) {
    float product[64];
    int reading = -1;
    for (int k = 0; k < kPositions / kRows; ++k) {
      const int i = k % kStages;
#if !defined(FULL)  // the stage has come
      mbarrier_wait(&full[i], k / kStages % 2);
#endif
#if !defined(FENCE)
      wgmma_fence();
#endif
      const uint64_t grad = wgmma_descriptor(shared + i * kStage, kPanel);
      const uint64_t input = wgmma_descriptor(shared + i * kStage, kPanel);
#if defined(DIVERGENT)
      wgmma<__nv_bfloat16, 128>(product, grad, threadIdx.x == 3 ? input + 64 : input, k > 0);
#else
      wgmma<__nv_bfloat16, 128>(product, grad, input, k > 0);
#endif
      wgmma_commit();
#if defined(RELEASE)  // the products that read the stage given back are still in flight
      reading = i;
#else
      wgmma_wait<1>();
#endif
      if (reading >= 0 && threadIdx.x % 32 == 0) mbarrier_arrive(&empty[reading], 0);
      reading = i;
#if defined(RELEASE)
      wgmma_wait<1>();
#endif
    }
#if defined(PRODUCT)  // the last products are done
    wgmma_wait<1>();
#else
    wgmma_wait_all(product);
#endif
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 64; ++i)
      out[wgmma_row(thread, i) * kFeatures + wgmma_column(thread, i)] = product[i];
#if defined(PRODUCT)
    wgmma_wait<0>();
#endif
  }
}

int main() {
  std::vector<__nv_bfloat16> x(kPositions * kFeatures);
  const auto value = [](int t, int feature) {
    return static_cast<float>((7 * t + 3 * feature) % 11 - 5);
  };
  for (int t = 0; t < kPositions; ++t)
    for (int i = 0; i < kFeatures; ++i) x[t * kFeatures + i] = __float2bfloat16(value(t, i));
  void* device = nullptr;
  float* out = nullptr;
  cudaMalloc(&device, x.size() * 2);
  cudaMalloc(&out, 64 * kFeatures * sizeof(float));
  cudaMemcpyAsync(device, x.data(), x.size() * 2, cudaMemcpyHostToDevice, nullptr);

  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &found);
  const cuuint64_t sizes[] = {kFeatures, kPositions, 1};
  const cuuint64_t strides[] = {2 * kFeatures, 2 * kFeatures * kPositions};
  const cuuint32_t box[] = {64, kRows, 1}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult made = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, device, sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (made != CUDA_SUCCESS) return 1;
#ifdef FASTUNLEARN_EMULATED
  emulator::launch(1, 256, kSharedBytes, [=] { ring_kernel(map, out); });
#else
  ring_kernel<<<1, 256, kSharedBytes>>>(map, out);
#endif

  std::vector<float> got(64 * kFeatures);
  cudaMemcpyAsync(got.data(), out, got.size() * sizeof(float), cudaMemcpyDeviceToHost, nullptr);
  cudaStreamSynchronize(nullptr);
  int wrong = 0;
  for (int p = 0; p < 64; ++p) {
    for (int d = 0; d < kFeatures; ++d) {
      float expected = 0;
      for (int t = 0; t < kPositions; ++t) expected += value(t, p) * value(t, d);
      wrong += !(got[p * kFeatures + d] == expected);  // a NaN is wrong too
    }
  }
  std::printf(wrong ? "wrong\n" : "right\n");
  cudaFree(device);
  cudaFree(out);
}
