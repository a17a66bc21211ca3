// out[v, :] += sum_n (sum over t with indices[n, t] == v of grad[n, t, :])^2
#pragma once

#include <cstdint>

namespace fastunlearn {

struct SqGradEmbeddingShape {
  int64_t samples = 0;
  int64_t positions = 0;
  int64_t rows = 0;      // V
  int64_t features = 0;  // D
  int64_t padding = -1;  // row without a gradient, -1 for none
};

struct SqGradEmbeddingParams {
  const int64_t* sorted_ids;  // [N T] ascending
  const int64_t* order;       // [N T] the flat position each came from, ascending within an id
  const void* grad;           // [N, T, D]
  void* out;                  // [V, D]
  SqGradEmbeddingShape shape;
};

inline constexpr int kEmbeddingThreads = 128;  // features per block

}  // namespace fastunlearn
