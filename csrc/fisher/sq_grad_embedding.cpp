// sq_grad_embedding on a CPU: threads over the sorted ids; a segment belongs to whoever holds its
// first place.
#include "fisher/sq_grad_embedding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/block_sum.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "fisher/doors.h"

namespace fastunlearn {
namespace {

// Sums over many rows of features, in blocks with totals in double, as LongSum.
template <typename T>
class RowSum {
 public:
  explicit RowSum(int64_t features) : total_(features), block_(features) {}

  // term(d) is what feature d grows by.
  template <typename Term>
  void add(const Term& term) {
    T* const block = block_.data();
    for (size_t d = 0; d < block_.size(); ++d) block[d] += term(d);
    if (++count_ % kSumBlock == 0) end_block();
  }
  // The sums; add() may go on.
  const double* value() {
    end_block();
    return total_.data();
  }
  void clear() {
    std::fill(total_.begin(), total_.end(), 0.0);
    std::fill(block_.begin(), block_.end(), T(0));
    count_ = 0;
  }

 private:
  void end_block() {
    for (size_t d = 0; d < block_.size(); ++d) total_[d] += block_[d];
    std::fill(block_.begin(), block_.end(), T(0));
  }

  std::vector<double> total_;
  std::vector<T> block_;
  int64_t count_ = 0;
};

template <typename Scalar>
void add_segment(const SqGradEmbeddingParams& params, int64_t place,
                 RowSum<CpuAccumulator<Scalar>>& sum, RowSum<CpuAccumulator<Scalar>>& squares) {
  using Acc = CpuAccumulator<Scalar>;
  const SqGradEmbeddingShape& shape = params.shape;
  const int64_t id = params.sorted_ids[place];
  const int64_t count = shape.samples * shape.positions;
  Acc* row = static_cast<Acc*>(params.out) + id * shape.features;
  const Scalar* grads = static_cast<const Scalar*>(params.grad);
  if (place + 1 == count || params.sorted_ids[place + 1] != id) {  // named once: most ids are
    const Scalar* grad = grads + params.order[place] * shape.features;
    for (int64_t d = 0; d < shape.features; ++d) {
      const Acc g = widen(grad[d]);
      row[d] += g * g;
    }
    return;
  }
  squares.clear();
  while (place < count && params.sorted_ids[place] == id) {
    const int64_t sample = params.order[place] / shape.positions;
    sum.clear();
    for (; place < count && params.sorted_ids[place] == id; ++place) {
      const int64_t at = params.order[place];
      if (at / shape.positions != sample) break;
      const Scalar* grad = grads + at * shape.features;
      sum.add([&](size_t d) { return widen(grad[d]); });
    }
    const double* gradient = sum.value();
    squares.add([&](size_t d) { return static_cast<Acc>(gradient[d] * gradient[d]); });
  }
  const double* total = squares.value();
  for (int64_t d = 0; d < shape.features; ++d) row[d] += static_cast<Acc>(total[d]);
}

void sq_grad_embedding_cpu(const Tensor& out, const Tensor& indices, const Tensor& grad_output,
                           std::optional<int64_t> padding_idx) {
  const EmbeddingDoor door(out, indices, grad_output, padding_idx);
  const SqGradEmbeddingParams params{
      door.sorted_ids.const_data_ptr<int64_t>(), door.order.const_data_ptr<int64_t>(),
      door.grad.const_data_ptr(), out.mutable_data_ptr(), door.shape};
  dispatch_storage<CpuTypes>(door.grad.scalar_type(), [&]<typename Scalar>() {
    torch::stable::parallel_for(0, door.sorted_ids.numel(), 64, [&](int64_t begin, int64_t end) {
      RowSum<CpuAccumulator<Scalar>> sum(door.shape.features), squares(door.shape.features);
      for (int64_t place = begin; place < end; ++place) {
        const int64_t id = params.sorted_ids[place];
        if (id == door.shape.padding || (place > 0 && params.sorted_ids[place - 1] == id)) continue;
        add_segment<Scalar>(params, place, sum, squares);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_embedding", TORCH_BOX(&sq_grad_embedding_cpu));
}

}  // namespace fastunlearn
