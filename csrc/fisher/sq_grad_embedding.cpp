// sq_grad_embedding on a CPU: threads over the sorted ids; a segment belongs to whoever holds its
// first place.
#include "fisher/sq_grad_embedding.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/block_sum.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "fisher/doors.h"

namespace fastunlearn {
namespace {

template <typename Scalar>
void add_segment(const SqGradEmbeddingParams& params, int64_t place,
                 std::vector<BlockSum<CpuAccumulator<Scalar>>>& sum) {
  using Acc = CpuAccumulator<Scalar>;
  const SqGradEmbeddingShape& shape = params.shape;
  const int64_t id = params.sorted_ids[place];
  const int64_t count = shape.samples * shape.positions;
  Acc* row = static_cast<Acc*>(params.out) + id * shape.features;
  std::vector<BlockSum<Acc>> squares(shape.features);
  while (place < count && params.sorted_ids[place] == id) {
    const int64_t sample = params.order[place] / shape.positions;
    sum.assign(shape.features, {});
    for (; place < count && params.sorted_ids[place] == id; ++place) {
      const int64_t at = params.order[place];
      if (at / shape.positions != sample) break;
      const Scalar* grad = static_cast<const Scalar*>(params.grad) + at * shape.features;
      for (int64_t d = 0; d < shape.features; ++d) sum[d].add(widen(grad[d]));
    }
    for (int64_t d = 0; d < shape.features; ++d) squares[d].add(sum[d].value() * sum[d].value());
  }
  for (int64_t d = 0; d < shape.features; ++d) row[d] += squares[d].value();
}

void sq_grad_embedding_cpu(const Tensor& out, const Tensor& indices, const Tensor& grad_output,
                           std::optional<int64_t> padding_idx) {
  const EmbeddingDoor door(out, indices, grad_output, padding_idx);
  const SqGradEmbeddingParams params{
      door.sorted_ids.const_data_ptr<int64_t>(), door.order.const_data_ptr<int64_t>(),
      door.grad.const_data_ptr(), out.mutable_data_ptr(), door.shape};
  dispatch_storage<CpuTypes>(door.grad.scalar_type(), [&]<typename Scalar>() {
    torch::stable::parallel_for(0, door.sorted_ids.numel(), 64, [&](int64_t begin, int64_t end) {
      std::vector<BlockSum<CpuAccumulator<Scalar>>> sum;
      for (int64_t place = begin; place < end; ++place) {
        const int64_t id = params.sorted_ids[place];
        if (id == door.shape.padding || (place > 0 && params.sorted_ids[place - 1] == id)) continue;
        add_segment<Scalar>(params, place, sum);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_embedding", TORCH_BOX(&sq_grad_embedding_cpu));
}

}  // namespace fastunlearn
