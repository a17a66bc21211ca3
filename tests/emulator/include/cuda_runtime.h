// CUDA for a CPU, for tests: the part of <cuda_runtime.h> that the kernels use, with every CUDA thread a fiber.
//
// Found before the real header by -I; sources compile as C++20 with -DFASTUNLEARN_EMULATED. One block runs at a
// time and its fibers switch only at barriers and warp collectives, so runs are repeatable.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// One block at a time: a block's shared memory can be a static variable of the kernel.
#define __shared__ static

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define EMULATOR_VECTOR(name, type, count, alignment, ...) \
  struct alignas(alignment) name {                         \
    type __VA_ARGS__;                                      \
  };
EMULATOR_VECTOR(int2, int, 2, 8, x, y)
EMULATOR_VECTOR(int4, int, 4, 16, x, y, z, w)
EMULATOR_VECTOR(uint2, unsigned, 2, 8, x, y)
EMULATOR_VECTOR(uint4, unsigned, 4, 16, x, y, z, w)
EMULATOR_VECTOR(float2, float, 2, 8, x, y)
EMULATOR_VECTOR(float4, float, 4, 16, x, y, z, w)
EMULATOR_VECTOR(double2, double, 2, 16, x, y)
#undef EMULATOR_VECTOR

// ---- the runtime library ---------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();

// ---- launching -------------------------------------------------------------------------------------------------

namespace emulator {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// Runs `body` once per thread of every block. FASTUNLEARN_EMULATOR_ORDER=reverse runs blocks and threads from the
// last to the first: a result that changes depends on an order that CUDA does not promise.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
void* dynamic_shared();  // exactly shared_bytes, 0xff in every byte at the start of a block
void require(bool condition, const char* what);

enum class Vote { kNone, kAny, kAll, kCount };
int block_barrier(Vote vote, int predicate);

// Every lane named in `mask` hands over 64 bits; returns where the 32 values lie until the next collective.
const uint64_t* exchange(unsigned mask, uint64_t value);
int lane();

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// A shuffle: `source` is a lane, and lanes outside `width` or the mask keep their own value.
template <typename T>
T shuffle(unsigned mask, T value, int source, bool valid) {
  const uint64_t* values = exchange(mask, to_bits(value));
  return valid ? from_bits<T>(values[source]) : value;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
#define warpSize (::emulator::kWarpSize)

// ---- barriers and warp collectives -----------------------------------------------------------------------------

inline void __syncthreads() { emulator::block_barrier(emulator::Vote::kNone, 0); }
inline int __syncthreads_or(int p) { return emulator::block_barrier(emulator::Vote::kAny, p); }
inline int __syncthreads_and(int p) { return emulator::block_barrier(emulator::Vote::kAll, p); }
inline int __syncthreads_count(int p) { return emulator::block_barrier(emulator::Vote::kCount, p); }
inline void __syncwarp(unsigned mask = emulator::kFullMask) { emulator::exchange(mask, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* votes = emulator::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
    if (mask >> lane & 1) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int first = emulator::lane() / width * width;
  return emulator::shuffle(mask, value, first + source % width, true);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int source = emulator::lane() - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source, source >= emulator::lane() / width * width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int source = emulator::lane() + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source, source < (emulator::lane() / width + 1) * width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int source = emulator::lane() ^ lanes;
  return emulator::shuffle(mask, value, source, source < (emulator::lane() / width + 1) * width);
}

// ---- atomics, as sanitizers know them --------------------------------------------------------------------------

template <typename T, typename Next>
T emulator_atomic(T* address, Next next) {
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do desired = next(old);
  while (!__atomic_compare_exchange(address, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator_atomic(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator_atomic(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulator_atomic(address, [=](T old) { return static_cast<T>(old | value); });
}

// ---- arithmetic ------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
[[noreturn]] inline void __trap() { std::abort(); }
