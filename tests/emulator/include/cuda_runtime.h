// The part of CUDA that our kernels use, on the CPU. Found before the real header in a build with
// -DFASTUNLEARN_EMULATED; the meaning of every name is NVIDIA's, and any program that compiles
// against this header compiles with nvcc (tests/test_emulator.py holds us to that).
//
// A block is a set of fibers, one per CUDA thread, that run in turn on the launching OS thread and
// change places only where a thread waits for others: at a barrier or a warp collective.
#pragma once

#include <math.h>  // CUDA puts sqrtf, fmaf and friends in the global namespace.

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time, so one copy per kernel is a copy per block.
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
// Empty: libstdc++ writes __attribute__((__noinline__)), which any other expansion would break.
#define __noinline__

// ---------------------------------------------------------------------------------- vector types

#define EMULATOR_VECTOR2(Name, T, Alignment) \
  struct alignas(Alignment) Name {           \
    T x, y;                                  \
  };                                         \
  inline Name make_##Name(T x, T y) { return Name{x, y}; }
#define EMULATOR_VECTOR4(Name, T) \
  struct alignas(16) Name {       \
    T x, y, z, w;                 \
  };                              \
  inline Name make_##Name(T x, T y, T z, T w) { return Name{x, y, z, w}; }

EMULATOR_VECTOR2(int2, int, 8)
EMULATOR_VECTOR2(uint2, unsigned, 8)
EMULATOR_VECTOR2(float2, float, 8)
EMULATOR_VECTOR2(double2, double, 16)
EMULATOR_VECTOR4(int4, int)
EMULATOR_VECTOR4(uint4, unsigned)
EMULATOR_VECTOR4(float4, float)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// The running thread's own; the scheduler rewrites them whenever it changes fibers.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ----------------------------------------------------------------------------------- the emulator

namespace emulator {

// Where a thread waits: the line in the kernel, for the deadlock report.
using Site = std::source_location;

// What one lane may hand to its warp: enough for its share of an mma tile.
struct alignas(16) Slot {
  std::byte bytes[64];
};

// Waits until every lane in `mask` has called with the same name and mask, then returns the slots
// of all 32 lanes. They stay until this thread's next collective. Lanes that `mask` does not name
// read as 0xFF bytes, which is a NaN in every floating-point type.
const Slot* meet_warp(const char* name, unsigned mask, const Slot& slot, Site site);

struct Votes {
  unsigned in_favour, cast;
};
// Waits until every live thread of the block has called from the same place.
Votes meet_block(const char* name, bool vote, Site site);

// The values that the lanes of a warp handed to a collective.
template <typename T>
class Lanes {
 public:
  explicit Lanes(const Slot* slots) : slots_(slots) {}
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, slots_[lane].bytes, sizeof(T));
    return value;
  }

 private:
  const Slot* slots_;
};

// Every lane hands in `value` and sees everyone's: the one primitive behind all warp collectives,
// public so that an emulated mma.sync can be built on it.
template <typename T>
Lanes<T> gather_warp(const char* name, unsigned mask, const T& value, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Slot));
  Slot slot = {};
  std::memcpy(slot.bytes, &value, sizeof(T));
  return Lanes<T>(meet_warp(name, mask, slot, site));
}

// The lane of the running thread in its warp.
inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

// Dynamic shared memory of the running block: exactly the bytes asked for, 128-byte aligned.
void* dynamic_shared();

using KernelBody = void (*)(const void* closure);
void launch_grid(dim3 grid, dim3 block, size_t shared_bytes, KernelBody body, const void* closure,
                 unsigned cluster);

// Runs `kernel()` once per thread of the grid and returns when all are done. A geometry that a GPU
// refuses is refused the same way: nothing runs and cudaGetLastError() tells.
// `cluster` neighbouring blocks run at the same time, each with its own dynamic shared memory.
template <typename Kernel>
void launch(dim3 grid, dim3 block, size_t shared_bytes, const Kernel& kernel,
            unsigned cluster = 1) {
  launch_grid(
      grid, block, shared_bytes,
      [](const void* closure) { (*static_cast<const Kernel*>(closure))(); }, &kernel, cluster);
}

}  // namespace emulator

// ------------------------------------------------------------------------ barriers and collectives

inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  emulator::meet_block("__syncthreads", true, site);
}
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::current()) {
  return static_cast<int>(
      emulator::meet_block("__syncthreads_count", predicate != 0, site).in_favour);
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::meet_block("__syncthreads_or", predicate != 0, site).in_favour != 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::current()) {
  const emulator::Votes votes = emulator::meet_block("__syncthreads_and", predicate != 0, site);
  return votes.in_favour == votes.cast;
}

// Fences order memory but synchronise nobody. Fibers see each other's writes in program order, and
// a kernel that mistakes a fence for a barrier must still look racy to ThreadSanitizer.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulator::Site site = emulator::Site::current()) {
  emulator::meet_warp("__syncwarp", mask, {}, site);
}

namespace emulator {
inline unsigned ballot(const char* name, unsigned mask, int predicate, Site site) {
  const auto lanes = gather_warp(name, mask, predicate != 0, site);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0 && lanes[lane]) bits |= 1u << lane;
  }
  return bits;
}
}  // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Site site = emulator::Site::current()) {
  return emulator::ballot("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulator::Site site = emulator::Site::current()) {
  return emulator::ballot("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulator::Site site = emulator::Site::current()) {
  return emulator::ballot("__all_sync", mask, predicate, site) == mask;
}

// Source lanes as in the PTX manual for shfl.sync: `width` cuts the warp into segments, and a
// source that up, down or xor would take from beyond the segment's end is the thread's own lane.
#define EMULATOR_SHUFFLES(T)                                                                     \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,                 \
                       emulator::Site site = emulator::Site::current()) {                        \
    const unsigned within = static_cast<unsigned>(width) - 1, lane = emulator::lane();           \
    return emulator::gather_warp(                                                                \
        "__shfl_sync", mask, value,                                                              \
        site)[(lane & ~within) | (static_cast<unsigned>(source) & within)];                      \
  }                                                                                              \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,          \
                          emulator::Site site = emulator::Site::current()) {                     \
    const unsigned within = static_cast<unsigned>(width) - 1, lane = emulator::lane();           \
    delta %= warpSize;                                                                           \
    return emulator::gather_warp("__shfl_up_sync", mask, value,                                  \
                                 site)[(lane & within) >= delta ? lane - delta : lane];          \
  }                                                                                              \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,        \
                            emulator::Site site = emulator::Site::current()) {                   \
    const unsigned within = static_cast<unsigned>(width) - 1, lane = emulator::lane();           \
    delta %= warpSize;                                                                           \
    return emulator::gather_warp("__shfl_down_sync", mask, value,                                \
                                 site)[(lane & within) + delta <= within ? lane + delta : lane]; \
  }                                                                                              \
  inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,          \
                           emulator::Site site = emulator::Site::current()) {                    \
    const unsigned within = static_cast<unsigned>(width) - 1, lane = emulator::lane();           \
    const unsigned source = lane ^ (static_cast<unsigned>(lane_mask) % warpSize);                \
    return emulator::gather_warp("__shfl_xor_sync", mask, value,                                 \
                                 site)[source <= (lane | within) ? source : lane];               \
  }
EMULATOR_SHUFFLES(int)
EMULATOR_SHUFFLES(unsigned)
EMULATOR_SHUFFLES(long)
EMULATOR_SHUFFLES(unsigned long)
EMULATOR_SHUFFLES(long long)
EMULATOR_SHUFFLES(unsigned long long)
EMULATOR_SHUFFLES(float)
EMULATOR_SHUFFLES(double)

// ---------------------------------------------------------------------------------------- atomics

namespace emulator {

template <typename T, typename... Choices>
concept OneOf = (std::same_as<T, Choices> || ...);
template <typename T>
concept AtomicInteger = OneOf<T, int, unsigned, unsigned long long>;
template <typename T>
concept AtomicNumber = AtomicInteger<T> || OneOf<T, float, double>;

// *address = update(*address); returns what was there. Relaxed, as on the GPU: an atomic by itself
// orders nothing else, and ThreadSanitizer is told exactly that.
template <typename T, typename Update>
T update_atomically(T* address, Update update) {
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, /*weak=*/false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulator

// std::type_identity_t: the address alone decides the type, as with CUDA's overloads.
template <emulator::AtomicNumber T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::update_atomically(address, [=](T old) -> T {
    if constexpr (std::same_as<T, int>) {
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));  // wraps
    } else {
      return old + value;
    }
  });
}
template <emulator::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulator::update_atomically(address, [=](T old) { return old | value; });
}
template <emulator::AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulator::update_atomically(address, [=](T old) { return old & value; });
}
template <emulator::AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::update_atomically(address, [=](T old) { return old < value ? value : old; });
}
template <emulator::AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::update_atomically(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
  requires emulator::AtomicInteger<T> || std::same_as<T, float>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::update_atomically(address, [=](T) { return value; });
}
template <emulator::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return emulator::update_atomically(address,
                                     [=](T old) { return old == expected ? desired : old; });
}

// ------------------------------------------------------------------------------------- intrinsics

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

// Compile with -ffp-contract=off: the whole point of these is that nothing fuses them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

[[noreturn]] inline void __trap() { __builtin_trap(); }

#define EMULATOR_MIN_MAX(T)                           \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
// A NaN loses against a number, as on the GPU.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

#undef EMULATOR_VECTOR2
#undef EMULATOR_VECTOR4
#undef EMULATOR_SHUFFLES
#undef EMULATOR_MIN_MAX

// --------------------------------------------------------------------------------------- host API

// Numbers as in the CUDA runtime.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// The driver's functions that <cuda.h> shadows: cuTensorMapEncodeTiled.
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1,
};
inline constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found = nullptr);

// Everything is done when a call returns, so streams are names only.
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMalloc(void** memory, size_t bytes);
template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
cudaError_t cudaFree(void* memory);
