// One-sided Jacobi: rotate the rows of many small square matrices until all are orthogonal to one
// another. The norms of the rows are then the singular values, their directions the right singular
// vectors, and the accumulated rotation holds the left ones.
//
// Pairs of rows that share no row are rotated at once (round-robin tournament), a warp each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"

namespace fastunlearn {

inline constexpr int kMaxSweeps = 30;  // 6 to 10 are usual; convergence is quadratic at the end
inline constexpr int kMaxWarps = 32;

// Rows whose cosine is no more than this are orthogonal: two rounding units. Where rounding alone
// holds a cosine just above it, the sweeps would not end: from the tenth on it doubles each time.
template <typename T>
FASTUNLEARN_HOST_DEVICE T jacobi_tolerance(int sweep) {
  const T epsilon = sizeof(T) == 4 ? T(1.1920928955078125e-7) : T(2.220446049250313e-16);
  return sweep < 10 ? epsilon : epsilon * static_cast<T>(1 << (sweep - 9 < 20 ? sweep - 9 : 20));
}

struct JacobiParams {
  void* rows;       // [batch, k, k]
  void* rotation;   // [batch, k, k] or null
  int64_t* sweeps;  // [batch], -1 where kMaxSweeps did not suffice
  int32_t size;     // k
};

struct JacobiPlan {
  int32_t warps = 1;
  int64_t shared_bytes = 0;  // 0: too large, the matrices stay in global memory
};

// As few warps as still need the same number of turns for a round's k / 2 pairs.
inline JacobiPlan plan_jacobi(int64_t size, int64_t element_bytes, bool with_rotation,
                              int64_t max_shared_bytes) {
  JacobiPlan plan;
  const int64_t pairs = std::max<int64_t>(1, (size + 1) / 2);
  const int64_t turns = (pairs + kMaxWarps - 1) / kMaxWarps;
  plan.warps = static_cast<int32_t>((pairs + turns - 1) / turns);
  const int64_t bytes = size * size * element_bytes * (with_rotation ? 2 : 1);
  // The kernel's static shared memory takes 1 KB of the same budget.
  plan.shared_bytes = bytes + 1024 <= max_shared_bytes ? bytes : 0;
  return plan;
}

struct RowPair {
  int32_t first, second;  // first < second; second may be k when k is odd: that row rests
};

// Pair `index` of round `round` among n players, n even: player n - 1 stays, the others move on.
FASTUNLEARN_HOST_DEVICE RowPair tournament_pair(int32_t round, int32_t index, int32_t n) {
  const int32_t a = index == 0 ? n - 1 : (round + index) % (n - 1);
  const int32_t b = (round + n - 1 - index) % (n - 1);
  return a < b ? RowPair{a, b} : RowPair{b, a};
}

}  // namespace fastunlearn
