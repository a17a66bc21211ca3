// What the instructions in csrc/common/mma.cuh mean, on the CPU. Nothing here is a CUDA header:
// mma.cuh includes it where nvcc would see inline PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <deque>

namespace emulator {

// ---------------------------------------------------------------------------------- tensor cores

template <typename Scalar>
float element(uint32_t pair, int which) {
  return static_cast<float>(std::bit_cast<Scalar>(static_cast<uint16_t>(pair >> 16 * which)));
}

// What one lane holds of a product of matrices.
struct Fragments {
  float d[4];
  uint32_t a[4], b[2];
};

// d += a b with a(row, k) and b(k, column) read from the lanes that hold them. Products of two
// operands are exact in fp32; tensor cores leave open in which order they are summed.
template <int kDepth, typename ElementA, typename ElementB>
void multiply(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const ElementA& element_a, const ElementB& element_b, Site site) {
  Fragments mine;
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const Lanes<Fragments> lanes = gather_warp(name, 0xffffffffu, mine, site);
  const int group = static_cast<int>(lane() / 4), member = static_cast<int>(lane() % 4);
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = 2 * member + i % 2;
    for (int k = 0; k < kDepth; ++k) d[i] += element_a(lanes, row, k) * element_b(lanes, k, column);
  }
}

template <typename Scalar>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
  multiply<16>(
      "mma.m16n8k16", d, a, b,
      [](const Lanes<Fragments>& lanes, int row, int k) {
        const int holder = row % 8 * 4 + k % 8 / 2;
        return element<Scalar>(lanes[holder].a[row / 8 + k / 8 * 2], k % 2);
      },
      [](const Lanes<Fragments>& lanes, int k, int column) {
        return element<Scalar>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      },
      site);
}

inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        Site site = Site::current()) {
  // Tensor cores ignore the lower 13 bits, which to_tf32() leaves open.
  const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); };
  multiply<8>(
      "mma.m16n8k8", d, a, b,
      [tf32](const Lanes<Fragments>& lanes, int row, int k) {
        return tf32(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]);
      },
      [tf32](const Lanes<Fragments>& lanes, int k, int column) {
        return tf32(lanes[column * 4 + k % 4].b[k / 4]);
      },
      site);
}

// To nearest, ties away from zero; the carry out of the largest finite number makes an infinity.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x != x ? 0x7fffffffu : bits;
  return bits + 0x1000u;  // the bits below are garbage, as on the GPU
}

[[noreturn]] inline void misuse(const char* what, const Site& site) {
  std::fprintf(stderr, "emulator: %s at %s:%u\n", what, site.file_name(),
               static_cast<unsigned>(site.line()));
  std::abort();
}

inline bool is_multiple_of(const void* address, size_t size) {
  return reinterpret_cast<uintptr_t>(address) % size == 0;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed,
                        Site site = Site::current()) {
  if (!is_multiple_of(row, 16)) misuse("ldmatrix: a row's address is no multiple of 16", site);
  const auto rows = gather_warp(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, row, site);
  const unsigned group = lane() / 4, member = lane() % 4;
  const auto at = [&](unsigned matrix, unsigned i, unsigned j) {
    return uint32_t{static_cast<const uint16_t*>(rows[8 * matrix + i])[j]};
  };
  for (unsigned i = 0; i < 4; ++i) {
    r[i] = transposed ? at(i, 2 * member, group) | at(i, 2 * member + 1, group) << 16
                      : at(i, group, 2 * member) | at(i, group, 2 * member + 1) << 16;
  }
}

// --------------------------------------------------------------------------- asynchronous copies

// A copy between its start and its arrival.
struct PendingCopy {
  void* to;
  const void* from;
  size_t size, bytes;  // written, and of these read
};
struct PendingCopies {
  std::deque<PendingCopy> copies;
  std::deque<size_t> groups;  // how many copies each committed group has, oldest first
  size_t open = 0;            // copies in no group yet

  void clear() {
    copies.clear();
    groups.clear();
    open = 0;
  }
};
// Of the running thread; empty at its start.
PendingCopies& pending_copies();

// Until it is waited for, a copy may land at any time: its place holds neither old data nor new,
// and a thread that still reads there is in a race with this one.
inline void cp_async(void* to, const void* from, int size, int bytes, Site site = Site::current()) {
  const size_t count = static_cast<size_t>(size);
  if (!is_multiple_of(to, count) || !is_multiple_of(from, count))
    misuse("cp.async: an address is no multiple of the size", site);
  if (bytes < 0 || bytes > size) misuse("cp.async: more bytes than its size", site);
  std::memset(to, 0xff, count);
  PendingCopies& pending = pending_copies();
  pending.copies.push_back({to, from, count, static_cast<size_t>(bytes)});
  ++pending.open;
}

inline void cp_async_commit() {
  PendingCopies& pending = pending_copies();
  pending.groups.push_back(pending.open);
  pending.open = 0;
}

inline void cp_async_wait(size_t left) {
  PendingCopies& pending = pending_copies();
  for (; pending.groups.size() > left; pending.groups.pop_front()) {
    for (size_t i = 0; i < pending.groups.front(); ++i) {
      const PendingCopy copy = pending.copies.front();
      pending.copies.pop_front();
      std::byte value[16] = {};
      if (copy.bytes > 0) std::memcpy(value, copy.from, copy.bytes);
      std::memcpy(copy.to, value, copy.size);
    }
  }
}

}  // namespace emulator
