// Hopper's asynchronous instructions (sm_90a): mbarriers, tensor copies, warpgroup products.
//
// Thin wrappers: one PTX instruction each, and in the emulated build its meaning on the CPU
// (tests/emulator/hopper.cpp). Names and semantics are those of the PTX ISA, sections
// "mbarrier", "cp.async.bulk.tensor" and "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifdef FASTUNLEARN_EMULATED
#include <emulated_hopper.h>
#elif defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma and setmaxnreg exist for sm_90a only: give this file CUDA_ARCHITECTURES 90a"
#endif

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

inline constexpr int kWarpgroupThreads = 128;

// ---------------------------------------------------------------------------------- shared memory

// What PTX calls a shared::cta address: 32 bits.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#ifdef FASTUNLEARN_EMULATED
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// --------------------------------------------------------------------------------------- mbarriers

// A phase of an mbarrier is complete when `arrivals` threads have arrived and all announced bytes
// have come. Phases are told apart by their parity; the first one has parity 0.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
#ifdef FASTUNLEARN_EMULATED
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Shows initialised barriers to the copy engine and to the other blocks of the cluster; a barrier
// among the threads must follow.
__device__ __forceinline__ void mbarrier_init_fence() {
#ifndef FASTUNLEARN_EMULATED
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives at the barrier at this place in block `rank` of the cluster. Orders no ordinary writes
// for that block: `.release.cluster` is a fence of the whole GPU per arrival, and what barriers
// hand over here is written by the copy engine and read by the tensor cores, which waits have
// ended.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, uint32_t rank) {
#ifdef FASTUNLEARN_EMULATED
  emulator::mbarrier_arrive(barrier, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Arrives at this block's own barrier and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
#ifdef FASTUNLEARN_EMULATED
  emulator::mbarrier_arrive_expect(barrier, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Waits until the phase of this parity is complete. Of a fresh barrier the phase before the first
// one, of parity 1, counts as complete. try_wait suspends the thread for a while by itself, so the
// loop does not spin. Like the arrival it orders no ordinary writes of another block.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef FASTUNLEARN_EMULATED
  emulator::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---------------------------------------------------------------------------------------- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
#ifdef FASTUNLEARN_EMULATED
  return emulator::cluster_rank();
#else
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// A barrier of every thread of the cluster; a launch without clusters has clusters of one block.
// Not .aligned: the threads of a warp may come from different branches.
__device__ __forceinline__ void cluster_sync() {
#ifdef FASTUNLEARN_EMULATED
  emulator::cluster_sync();
#else
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// ----------------------------------------------------------------------------------- tensor copies

// Loads the tensor map into its cache ahead of the first copy.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
#ifdef FASTUNLEARN_EMULATED
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
#endif
}

// Copies the box of a rank-3 tensor at (x, y, z), x along the contiguous axis, to shared memory and
// completes its bytes on `barrier`. What lies outside the tensor is written as zero and counts.
__device__ __forceinline__ void copy_tensor_3d(void* to, const CUtensorMap* map, uint64_t* barrier,
                                               int32_t x, int32_t y, int32_t z) {
#ifdef FASTUNLEARN_EMULATED
  emulator::copy_tensor_3d(to, map, barrier, x, y, z, 0);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// The same into every block of the cluster whose bit is set in `blocks`, at the same place, with
// the bytes completed on each block's own barrier. Device memory and L2 are read once.
__device__ __forceinline__ void multicast_tensor_3d(void* to, const CUtensorMap* map,
                                                    uint64_t* barrier, int32_t x, int32_t y,
                                                    int32_t z, uint16_t blocks) {
#ifdef FASTUNLEARN_EMULATED
  emulator::copy_tensor_3d(to, map, barrier, x, y, z, blocks);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z),
      "h"(blocks)
      : "memory");
#endif
}

// ------------------------------------------------------------------------------------------- wgmma

// The 64-bit description of an operand in shared memory, MN-major, swizzled by 128 bytes.
//
//   bits  0-13  start address >> 4          bits 49-51  base offset
//   bits 16-29  leading byte offset >> 4    bits 62-63  swizzle: 1 for 128 bytes
//   bits 32-45  stride byte offset >> 4
//
// "MN-major" (imm-trans = 1): consecutive addresses run along M of A, or N of B, which are our
// features; K is our positions. The canonical layout for 16-bit types, in elements of a
// 16-byte unit T = 8, is (PTX ISA, "Shared Memory Matrix Layout";
// cute/atom/mma_traits_sm90_gmma.hpp)
//
//   Swizzle<3,4,3> o ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO))
//
// so that element (mn, k) lies, before swizzling, at byte
//
//   start + 2 (mn % 8) + 16 (mn / 8 % 8) + LBO (mn / 64) + 128 (k % 8) + SBO (k / 8)
//
// Reading it off: 64 features are one row of 128 bytes, 8 positions are 8 such rows, 1024 bytes:
// the atom. SBO leads to the atom of the next 8 positions, LBO to that of the next 64 features.
// A box of a tensor copy with 64 features and R positions is exactly R rows of 128 bytes, so
// SBO = 1024, and boxes side by side are LBO = 128 R apart. The next K = 16 is 2048 bytes on.
//
// Both the copy engine and wgmma swizzle the address itself, bits 4-6 ^= bits 7-9: the unit within
// a row by the row's number modulo 8. They agree when the rows of every box start on a multiple of
// 1024 bytes; then the base offset is 0, and so it stays for steps of 2048 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* start, uint32_t leading_bytes) {
  constexpr uint64_t kStrideBytes = 1024;
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16 | kStrideBytes >> 4 << 32 |
         kSwizzle128 << 62;
}

// What to add to a descriptor for the next kWgmmaDepth positions: 16 rows of 128 bytes, in units of
// 16 bytes.
inline constexpr int kWgmmaDepth = 16;
inline constexpr uint64_t kWgmmaDepthStep = kWgmmaDepth * 128 >> 4;

// Orders this warpgroup's accesses to accumulators before the products that follow. Due before the
// first product and after every other use of the accumulators.
__device__ __forceinline__ void wgmma_fence() {
#ifdef FASTUNLEARN_EMULATED
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of all products issued since the last one.
__device__ __forceinline__ void wgmma_commit() {
#ifdef FASTUNLEARN_EMULATED
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kPending of the latest groups are in flight: the operands of the others have
// been read.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef FASTUNLEARN_EMULATED
  emulator::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for every product and hands out their accumulators. To the compiler an accumulator has its
// value from the wgmma on; the empty statements keep it from moving a use before the wait.
template <int kCount>
__device__ __forceinline__ void wgmma_wait_all(float (&accumulators)[kCount]) {
  wgmma_wait<0>();
#ifndef FASTUNLEARN_EMULATED
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
#else
  (void)accumulators;
#endif
}

// The element of a warpgroup's 64 x kColumns product that a thread's accumulator i holds.
__device__ __forceinline__ int wgmma_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
__device__ __forceinline__ int wgmma_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

#ifndef FASTUNLEARN_EMULATED
// Operand lists of 64, 96 and 128 accumulators, which asm wants spelled out.
// clang-format off
#define FU_TEN(t)                                                                       \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %"   \
  #t "8, %" #t "9, "
#define FU_NAMES_60 FU_TEN() FU_TEN(1) FU_TEN(2) FU_TEN(3) FU_TEN(4) FU_TEN(5)
#define FU_NAMES_90 FU_NAMES_60 FU_TEN(6) FU_TEN(7) FU_TEN(8)
#define FU_NAMES_64 FU_NAMES_60 "%60, %61, %62, %63"
#define FU_NAMES_96 FU_NAMES_90 "%90, %91, %92, %93, %94, %95"
#define FU_NAMES_128 \
  FU_NAMES_90 FU_TEN(9) FU_TEN(10) FU_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on
#define FU_EIGHT(i)                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FU_VALUES_32(i) FU_EIGHT(i), FU_EIGHT(i + 8), FU_EIGHT(i + 16), FU_EIGHT(i + 24)
#define FU_VALUES_64 FU_VALUES_32(0), FU_VALUES_32(32)
#define FU_VALUES_96 FU_VALUES_64, FU_VALUES_32(64)
#define FU_VALUES_128 FU_VALUES_96, FU_VALUES_32(96)
// After the descriptors: the predicate for D += or D =, scales 1 and 1, both operands MN-major.
#define FU_WGMMA(columns, type, values, a, b, p)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p                                 \
               ", 0;\n"                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type \
               " {" FU_NAMES_##values "}, %" #a ", %" #b ", p, 1, 1, 1, 1;\n}\n"       \
               : FU_VALUES_##values                                                    \
               : "l"(grad), "l"(input), "r"(static_cast<int32_t>(accumulate)))
#endif

// d[64, kColumns] (+)= sum over 16 positions of  grad[k, 64]^T input[k, kColumns],  asynchronously;
// `grad` and `input` are descriptors. Without `accumulate`, d is overwritten.
template <typename Scalar, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t grad, uint64_t input,
                                      bool accumulate) {
  static_assert(kColumns == 128 || kColumns == 192 || kColumns == 256);
#ifdef FASTUNLEARN_EMULATED
  emulator::wgmma<Scalar>(d, kColumns, grad, input, accumulate);
#else
  if constexpr (std::is_same_v<Scalar, __nv_bfloat16>) {
    if constexpr (kColumns == 128) FU_WGMMA(128, bf16, 64, 64, 65, 66);
    if constexpr (kColumns == 192) FU_WGMMA(192, bf16, 96, 96, 97, 98);
    if constexpr (kColumns == 256) FU_WGMMA(256, bf16, 128, 128, 129, 130);
  } else {
    static_assert(std::is_same_v<Scalar, __half>);
    if constexpr (kColumns == 128) FU_WGMMA(128, f16, 64, 64, 65, 66);
    if constexpr (kColumns == 192) FU_WGMMA(192, f16, 96, 96, 97, 98);
    if constexpr (kColumns == 256) FU_WGMMA(256, f16, 128, 128, 129, 130);
  }
#endif
}

#ifndef FASTUNLEARN_EMULATED
#undef FU_TEN
#undef FU_NAMES_60
#undef FU_NAMES_90
#undef FU_NAMES_64
#undef FU_NAMES_96
#undef FU_NAMES_128
#undef FU_EIGHT
#undef FU_VALUES_32
#undef FU_VALUES_64
#undef FU_VALUES_96
#undef FU_VALUES_128
#undef FU_WGMMA
#endif

// --------------------------------------------------------------------------------------- registers

// Moves registers between warpgroups; every warp of the warpgroup must say the same. ptxas obeys
// only in a kernel whose register count at entry is capped (__launch_bounds__(threads, 1)).
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifndef FASTUNLEARN_EMULATED
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifndef FASTUNLEARN_EMULATED
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace
}  // namespace fastunlearn
