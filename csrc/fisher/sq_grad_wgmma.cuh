// The squared per-sample gradient by Hopper's warpgroup products, for bf16 and fp16 rows.
//
// A block owns kWgmmaTileOut x kTileIn of the result. One thread copies stages of both operands to
// a ring in shared memory; two warpgroups multiply them, each its own 64 output features. They meet
// nowhere but at the ring, so while one squares at a sample's end the other multiplies on, up to a
// ring ahead.
//
// With clusters of two, neighbours in output features copy half the positions of their common input
// tile each, into both: of a 128 x 256 tile's 384 rows of features L2 then gives 256.
#pragma once

#include "common/block_sum.h"
#include "common/hopper.cuh"
#include "common/shared_memory.cuh"
#include "fisher/sq_grad_wgmma.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// 2 x 128 x 232 + 128 x 40 of 65,536 registers.
inline constexpr int kConsumerRegisters = 232;
inline constexpr int kProducerRegisters = 40;

// The place in the ring: a stage, and the parity of how often the ring has been gone round.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Keeps the compiler from moving accesses to memory across; costs no instruction.
__device__ __forceinline__ void compiler_barrier() { asm volatile("" ::: "memory"); }

// A thread's sums of squares of the samples since the last flush: registers, or its own column of
// shared memory, which needs no barrier. There, 16 bytes at a time, a warp's lie side by side.
template <int kTileIn, bool kInShared = WgmmaTile<kTileIn>::kSquaresInShared>
struct WgmmaSquares {
  static constexpr int kCount = kTileIn / 2;
  float values[kCount];

  __device__ __forceinline__ explicit WgmmaSquares(void*) { clear(); }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = 0;
  }
  __device__ __forceinline__ void add(const float (&product)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += product[i] * product[i];
  }
  __device__ __forceinline__ float4 get(int i) const {
    return make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  }
};
template <int kTileIn>
struct WgmmaSquares<kTileIn, true> {
  static constexpr int kCount = kTileIn / 2;
  static constexpr int kThreads = kWgmmaConsumers * kWarpgroupThreads;
  float4* own;

  __device__ __forceinline__ explicit WgmmaSquares(void* shared)
      : own(static_cast<float4*>(shared) + threadIdx.x) {
    clear();
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) own[i * kThreads] = make_float4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void add(const float (&product)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      float4 sum = own[i * kThreads];
      sum.x += product[4 * i] * product[4 * i];
      sum.y += product[4 * i + 1] * product[4 * i + 1];
      sum.z += product[4 * i + 2] * product[4 * i + 2];
      sum.w += product[4 * i + 3] * product[4 * i + 3];
      own[i * kThreads] = sum;
      // Four in flight; free to hoist all 32 loads, the compiler spills.
      if (i % 4 == 3) compiler_barrier();
    }
  }
  __device__ __forceinline__ float4 get(int i) const { return own[i * kThreads]; }
};

// grad [N, T, P] and input [N, T, D] as tensor maps whose boxes are kWgmmaPanel features by
// kStageRows positions, of which `input` has half in a cluster of two.
template <typename Scalar, int kTileIn>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    sq_grad_wgmma_kernel(const __grid_constant__ CUtensorMap grad,
                         const __grid_constant__ CUtensorMap input, SqGradShape shape,
                         SqGradWgmmaPlan plan, float* out) {
  using Tile = WgmmaTile<kTileIn>;

  // stages | sums of squares | full barriers | empty barriers
  unsigned char* shared = dynamic_shared<unsigned char>();
  shared += (Tile::kAlignment - shared_address(shared) % Tile::kAlignment) % Tile::kAlignment;
  unsigned char* squares_at = shared + Tile::kStages * Tile::kStageBytes;
  uint64_t* full = reinterpret_cast<uint64_t*>(squares_at + Tile::kSquaresBytes);
  uint64_t* empty = full + Tile::kStages;

  // blockIdx.x = (split * tiles_in + tile_in) * tiles_out + tile_out: the blocks of a cluster, and
  // most of those that run at a time, share an input tile.
  int64_t block = blockIdx.x;
  const int64_t first_out = block % plan.tiles_out * kWgmmaTileOut;
  block /= plan.tiles_out;
  const int64_t first_in = block % plan.tiles_in * kTileIn;
  const int64_t split = block / plan.tiles_in;
  const int first_sample = static_cast<int>(split * plan.samples_per_split);
  const int last_sample = static_cast<int>(
      min(static_cast<int64_t>(first_sample) + plan.samples_per_split, shape.samples));
  const int positions = static_cast<int>(shape.positions);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      // Every multiplying warp of every block that a copy of this stage writes to.
      mbarrier_init(&empty[stage], kWgmmaConsumers * 4 * plan.cluster);
    }
    mbarrier_init_fence();
  }
  cluster_sync();

  RingPlace<Tile::kStages> place;
  // The same in all lanes, and ptxas knows it: setmaxnreg and wgmma want whole warps.
  const int warpgroup =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0) / kWarpgroupThreads;

  if (warpgroup == kWgmmaConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kWgmmaConsumers * kWarpgroupThreads) {
      prefetch_tensor_map(&grad);
      prefetch_tensor_map(&input);
      const int rows = Tile::kStageRows / plan.cluster;  // of the input tile, copied by this block
      const int first_row = static_cast<int>(cluster_rank()) * rows;
      for (int n = first_sample; n < last_sample; ++n) {
        for (int t = 0; t < positions; t += Tile::kStageRows) {
          mbarrier_wait(&empty[place.stage], place.parity ^ 1);
          uint64_t* barrier = &full[place.stage];
          mbarrier_arrive_expect(barrier, Tile::kStageBytes);
          unsigned char* to = shared + place.stage * Tile::kStageBytes;
#pragma unroll
          for (int panel = 0; panel < kWgmmaTileOut / kWgmmaPanel; ++panel) {
            copy_tensor_3d(to + panel * Tile::kPanelBytes, &grad, barrier,
                           static_cast<int>(first_out) + panel * kWgmmaPanel, t, n);
          }
          to += Tile::kGradBytes + first_row * 128;
#pragma unroll
          for (int panel = 0; panel < kTileIn / kWgmmaPanel; ++panel) {
            const int first = static_cast<int>(first_in) + panel * kWgmmaPanel;
            unsigned char* half = to + panel * Tile::kPanelBytes;
            if (plan.cluster == 1) {
              copy_tensor_3d(half, &input, barrier, first, t, n);
            } else {
              multicast_tensor_3d(half, &input, barrier, first, t + first_row, n, 0b11);
            }
          }
          place.next();
        }
      }
    }
    // The other block may still arrive at this one's barriers and copy into its stages.
    cluster_sync();
  } else {
    take_registers<kConsumerRegisters>();
    const int thread = threadIdx.x % kWarpgroupThreads;
    auto release = [&](int stage) {
      if (thread % 32 != 0) return;
#pragma unroll 1
      for (int rank = 0; rank < plan.cluster; ++rank) mbarrier_arrive(&empty[stage], rank);
    };

    float product[kTileIn / 2];
    WgmmaSquares<kTileIn> squares(squares_at);
    // With one split `out` is the result [P, D]; with more it is the workspace [splits, P, D],
    // which nobody has written before the first flush.
    bool accumulate = plan.splits == 1;
    auto flush = [&] {
      const int64_t p = first_out + warpgroup * 64 + wgmma_row(thread, 0);
      const int64_t d = first_in + wgmma_column(thread, 0);
      float* row = out + (split * shape.out_features + p) * shape.in_features + d;
      float* row_8 = row + 8 * shape.in_features;
      auto add = [&](float* to, float x, float y) {
        float2* pair = reinterpret_cast<float2*>(to);
        const float2 before = accumulate ? *pair : make_float2(0, 0);
        *pair = make_float2(before.x + x, before.y + y);
      };
#pragma unroll
      for (int i = 0; i < kTileIn / 8; ++i) {
        if (d + 8 * i >= shape.in_features) continue;
        const float4 sums = squares.get(i);
        if (p < shape.out_features) add(row + 8 * i, sums.x, sums.y);
        if (p + 8 < shape.out_features) add(row_8 + 8 * i, sums.z, sums.w);
      }
      accumulate = true;
      squares.clear();
    };

    for (int n = first_sample; n < last_sample; ++n) {
      int reading = -1;  // the stage of the products in flight
      for (int t = 0; t < positions; t += Tile::kStageRows) {
        mbarrier_wait(&full[place.stage], place.parity);
        const unsigned char* stage = shared + place.stage * Tile::kStageBytes;
        uint64_t grads = wgmma_descriptor(stage + warpgroup * Tile::kPanelBytes, Tile::kPanelBytes);
        uint64_t inputs = wgmma_descriptor(stage + Tile::kGradBytes, Tile::kPanelBytes);
        if (positions - t > Tile::kStageRows - kWgmmaDepth) {
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < Tile::kStageRows / kWgmmaDepth; ++step) {
            wgmma<Scalar, kTileIn>(product, grads + step * kWgmmaDepthStep,
                                   inputs + step * kWgmmaDepthStep, step > 0 || t > 0);
          }
          wgmma_commit();  // in each branch: where they join, ptxas would make a group of its own
        } else {
          // Rows past the last position are zero. Those of a started step count nothing; steps of
          // nothing else are left out. The fence in the loop is what ptxas wants between blocks of
          // straight code.
#pragma unroll 1
          for (int step = 0; step * kWgmmaDepth < positions - t; ++step) {
            wgmma_fence();
            wgmma<Scalar, kTileIn>(product, grads, inputs, step > 0 || t > 0);
            grads += kWgmmaDepthStep;
            inputs += kWgmmaDepthStep;
          }
          wgmma_commit();
        }
        if (reading >= 0) {  // the tensor cores have this stage's products to do meanwhile
          wgmma_wait<1>();
          release(reading);
        }
        reading = place.stage;
        place.next();
      }
      wgmma_wait_all(product);
      release(reading);
      squares.add(product);
      // A rounding error that grows with kSumBlock + n / kSumBlock, as in the other kernels; the
      // second level of the sum lies in `out`.
      if ((n - first_sample) % kSumBlock == kSumBlock - 1) flush();
    }
    if ((last_sample - first_sample) % kSumBlock != 0) flush();
    cluster_sync();
  }
}

}  // namespace
}  // namespace fastunlearn
