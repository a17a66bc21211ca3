// Embedding rows by sorted segments: whoever stands first in an id's segment walks it, in order,
// alone.
#pragma once

#include "common/block_sum.h"
#include "common/scalar.cuh"
#include "fisher/sq_grad_embedding.h"

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

// blockIdx.x = place * chunks + chunk; a place is an index into the sorted ids.
template <typename Scalar>
__global__ void __launch_bounds__(kEmbeddingThreads)
    sq_grad_embedding_kernel(const int64_t* sorted_ids, const int64_t* order, const Scalar* grad,
                             SqGradEmbeddingShape shape, int64_t chunks, Accumulator<Scalar>* out) {
  using Acc = Accumulator<Scalar>;
  const int64_t place = blockIdx.x / chunks;
  const int64_t feature = blockIdx.x % chunks * kEmbeddingThreads + threadIdx.x;
  const int64_t count = shape.samples * shape.positions;
  const int64_t id = sorted_ids[place];
  if (id < 0 || id >= shape.rows) __trap();  // as torch's own embedding does
  if (place > 0 && sorted_ids[place - 1] == id) return;
  if (id == shape.padding || feature >= shape.features) return;

  BlockSum<Acc> squares, sum;
  int64_t sample = order[place] / shape.positions;
  for (int64_t i = place; i < count && sorted_ids[i] == id; ++i) {
    const int64_t at = order[i];
    if (at / shape.positions != sample) {
      squares.add(sum.value() * sum.value());
      sum = {};
      sample = at / shape.positions;
    }
    sum.add(widen(grad[at * shape.features + feature]));
  }
  squares.add(sum.value() * sum.value());
  out[id * shape.features + feature] += squares.value();
}

}  // namespace
}  // namespace fastunlearn
