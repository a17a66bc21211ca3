// What the wrappers of csrc/common/hopper.cuh mean on the CPU; tests/emulator/hopper.cpp.
//
// Everything asynchronous happens at one of its two extremes. FASTUNLEARN_EMULATOR_ASYNC, read at
// every launch, says which:
//   late   (default) a copy writes when no thread can go on without it, a product reads its
//   operands
//          as it is issued: whoever forgets to wait for a copy finds what was there before
//   early  a copy writes as it is issued, a product reads its operands when no thread can go on
//          without it: a stage that is refilled or given back too early changes under its readers
// Accumulators of products in flight are NaN in both. The end of a copy and of a product is seen
// only through a wait, which takes effect when no other thread can run.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace emulator {

uint32_t shared_address(const void* pointer);

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site site = Site::current());
void mbarrier_arrive(uint64_t* barrier, uint32_t rank, Site site = Site::current());
void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::current());
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current());

uint32_t cluster_rank();
void cluster_sync(Site site = Site::current());

// To the blocks of the cluster whose bits are set; 0: the running one.
void copy_tensor_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t x, int32_t y,
                    int32_t z, uint16_t blocks, Site site = Site::current());

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending, Site site = Site::current());
// d[64, columns] (+)= A^T B over 16 positions; A and B are MN-major, by descriptor.
void wgmma_16_bit(float* d, int columns, uint64_t a, uint64_t b, bool accumulate, bool is_bfloat16,
                  Site site);

template <typename Scalar>
void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool accumulate,
           Site site = Site::current()) {
  wgmma_16_bit(d, columns, a, b, accumulate, std::is_same_v<Scalar, __nv_bfloat16>, site);
}

}  // namespace emulator
