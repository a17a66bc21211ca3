// Tensor cores and asynchronous copies of compute capability 8.0 and later: the instructions that
// C++ has no name for. Layouts as in the PTX manual, "warp-level matrix instructions": lane l of a
// warp is called by group = l / 4 and member = l % 4, and a register holds two 16-bit elements, the
// lower half first, or one TF32 element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifdef FASTUNLEARN_EMULATED
#include <emulated_ptx.h>
#endif

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

#ifndef FASTUNLEARN_EMULATED
// A pointer into shared memory as the instructions below want it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// d [16, 8] += a [16, 16] b [16, 8], all lanes of the warp together, fp32 sums.
//   a: rows group (a[0], a[2]) and group + 8 (a[1], a[3]), columns 2 member + {0, 1}, + 8 in a[2]
//      and a[3]
//   b: column group, rows 2 member + {0, 1}, + 8 in b[1]
//   d: rows group (d[0], d[1]) and group + 8 (d[2], d[3]), columns 2 member + {0, 1}
template <typename Scalar>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  constexpr bool kBFloat16 = std::is_same_v<Scalar, __nv_bfloat16>;
  static_assert(kBFloat16 || std::is_same_v<Scalar, __half>);
#ifdef FASTUNLEARN_EMULATED
  emulator::mma_m16n8k16<Scalar>(d, a, b);
#else
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d [16, 8] += a [16, 8] b [8, 8] in TF32, fp32 sums. Operands come from to_tf32().
//   a: rows group (a[0], a[2]) and group + 8 (a[1], a[3]), column member, + 4 in a[2] and a[3]
//   b: column group, row member, + 4 in b[1]
//   d: as above
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#ifdef FASTUNLEARN_EMULATED
  emulator::mma_m16n8k8(d, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest number of 10 bits of mantissa, ties away from zero. The tensor cores would cut the
// other 13 bits off, which doubles the error and biases it towards zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef FASTUNLEARN_EMULATED
  return emulator::to_tf32(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane l hands in the address of row l % 8 of matrix l / 8,
// in shared memory and a multiple of 16. r[i] is row group, columns 2 member + {0, 1} of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef FASTUNLEARN_EMULATED
  emulator::ldmatrix_x4(r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same, transposed on the way: r[i] is rows 2 member + {0, 1}, column group of matrix i.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef FASTUNLEARN_EMULATED
  emulator::ldmatrix_x4(r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Starts to copy kBytes (4, 8 or 16) to shared memory, the first `bytes` of them from `from` and
// zeros for the rest. Both addresses are multiples of kBytes, also where nothing is read. What
// arrives is this thread's to see after cp_async_wait, and the block's after a barrier that follows
// it.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to_shared, const void* from, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef FASTUNLEARN_EMULATED
  emulator::cp_async(to_shared, from, kBytes, bytes);
#else
  if constexpr (kBytes == 16) {
    // .cg: past L1, where no other thread of the block would look for it.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to_shared)), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(to_shared)), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#endif
}

// Closes the group of copies that this thread has started since the last one; it may be empty.
__device__ __forceinline__ void cp_async_commit() {
#ifdef FASTUNLEARN_EMULATED
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups, the latest, are still on their way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef FASTUNLEARN_EMULATED
  emulator::cp_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
#endif
}

}  // namespace
}  // namespace fastunlearn
