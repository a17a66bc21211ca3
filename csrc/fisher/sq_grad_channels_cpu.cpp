// The clones of the sums.
#include "fisher/sq_grad_channels_cpu.h"

#include <type_traits>

#include "common/block_sum.h"

namespace fastunlearn {
namespace {

template <typename Scalar>
using Lanes = typename VectorOf<CpuAccumulator<Scalar>>::type;

template <typename Scalar>
FASTUNLEARN_INLINE Lanes<Scalar> load(const Scalar* from) {
  using Acc = CpuAccumulator<Scalar>;
  if constexpr (std::is_same_v<Scalar, Acc>) {
    return *reinterpret_cast<const typename VectorOf<Acc>::unaligned*>(from);
  } else {
    Lanes<Scalar> values = {};
    for (int i = 0; i < VectorOf<Acc>::kLanes; ++i) values[i] = widen(from[i]);
    return values;
  }
}

// As many terms as a vector has lanes, from `at` on.
template <typename Scalar>
FASTUNLEARN_INLINE Lanes<Scalar> terms(const Scalar* grad, const Scalar* normalized, int64_t at) {
  const Lanes<Scalar> g = load(grad + at);
  return normalized == nullptr ? g : g * load(normalized + at);
}

template <typename Scalar>
FASTUNLEARN_INLINE CpuAccumulator<Scalar> term(const Scalar* grad, const Scalar* normalized,
                                               int64_t at) {
  const CpuAccumulator<Scalar> g = widen(grad[at]);
  return normalized == nullptr ? g : g * widen(normalized[at]);
}

template <typename Scalar>
FASTUNLEARN_INLINE CpuAccumulator<Scalar> sum_plane(const Scalar* grad, const Scalar* normalized,
                                                    int64_t count) {
  using Acc = CpuAccumulator<Scalar>;
  constexpr int kLanes = VectorOf<Acc>::kLanes;
  constexpr int kChains = 4;  // additions in flight
  Lanes<Scalar> total[kChains] = {};
  int64_t at = 0;
  while (at + kChains * kLanes <= count) {
    Lanes<Scalar> block[kChains] = {};
    for (int k = 0; k < kSumBlock && at + kChains * kLanes <= count; ++k) {
      for (int v = 0; v < kChains; ++v, at += kLanes) block[v] += terms(grad, normalized, at);
    }
    for (int v = 0; v < kChains; ++v) total[v] += block[v];
  }
  for (; at + kLanes <= count; at += kLanes) total[0] += terms(grad, normalized, at);
  total[0] = (total[0] + total[1]) + (total[2] + total[3]);
  Acc sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[0][i];
  Acc rest = 0;
  for (; at < count; ++at) rest += term(grad, normalized, at);
  return sum + rest;
}

template <typename Scalar>
FASTUNLEARN_INLINE void sum_rows(const Scalar* grad, const Scalar* normalized, int rows,
                                 int64_t stride, int64_t columns, CpuAccumulator<Scalar>* sums) {
  using Acc = CpuAccumulator<Scalar>;
  using Unaligned = typename VectorOf<Acc>::unaligned;
  constexpr int kLanes = VectorOf<Acc>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Lanes<Scalar> sum = {};
    for (int t = 0; t < rows; ++t) sum += terms(grad, normalized, t * stride + c);
    *reinterpret_cast<Unaligned*>(sums + c) += sum;
  }
  for (; c < columns; ++c) {
    Acc sum = 0;
    for (int t = 0; t < rows; ++t) sum += term(grad, normalized, t * stride + c);
    sums[c] += sum;
  }
}

}  // namespace

#define FASTUNLEARN_CHANNEL_SUMS(Scalar)                                                           \
  FASTUNLEARN_CPU_CLONES CpuAccumulator<Scalar> sum_plane_cpu(                                     \
      const Scalar* grad, const Scalar* normalized, int64_t count) {                               \
    return normalized == nullptr ? sum_plane<Scalar>(grad, nullptr, count)                         \
                                 : sum_plane(grad, normalized, count);                             \
  }                                                                                                \
  FASTUNLEARN_CPU_CLONES void sum_rows_cpu(const Scalar* grad, const Scalar* normalized, int rows, \
                                           int64_t stride, int64_t columns,                        \
                                           CpuAccumulator<Scalar>* sums) {                         \
    if (normalized == nullptr) {                                                                   \
      sum_rows<Scalar>(grad, nullptr, rows, stride, columns, sums);                                \
    } else {                                                                                       \
      sum_rows(grad, normalized, rows, stride, columns, sums);                                     \
    }                                                                                              \
  }
FASTUNLEARN_CHANNEL_SUMS(float)
FASTUNLEARN_CHANNEL_SUMS(double)
FASTUNLEARN_CHANNEL_SUMS(c10::BFloat16)
FASTUNLEARN_CHANNEL_SUMS(c10::Half)
#undef FASTUNLEARN_CHANNEL_SUMS

}  // namespace fastunlearn
