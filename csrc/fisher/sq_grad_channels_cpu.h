// The sums behind sq_grad_affine and sq_grad_bias on a CPU.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace fastunlearn {

// sum over i < count of grad[i] * normalized[i], or of grad[i] where `normalized` is null, in
// blocks.
#define FASTUNLEARN_CHANNEL_SUMS(Scalar)                                                           \
  CpuAccumulator<Scalar> sum_plane_cpu(const Scalar* grad, const Scalar* normalized,               \
                                       int64_t count);                                             \
  /* sums[c] += the same over `rows` rows of `columns` numbers, `stride` apart; rows <= kSumBlock. \
   */                                                                                              \
  void sum_rows_cpu(const Scalar* grad, const Scalar* normalized, int rows, int64_t stride,        \
                    int64_t columns, CpuAccumulator<Scalar>* sums);
FASTUNLEARN_CHANNEL_SUMS(float)
FASTUNLEARN_CHANNEL_SUMS(double)
FASTUNLEARN_CHANNEL_SUMS(c10::BFloat16)
FASTUNLEARN_CHANNEL_SUMS(c10::Half)
#undef FASTUNLEARN_CHANNEL_SUMS

}  // namespace fastunlearn
