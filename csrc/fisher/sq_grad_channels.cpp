// sq_grad_affine and sq_grad_bias on a CPU.
#include "fisher/sq_grad_channels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/block_sum.h"
#include "common/dispatch.h"
#include "fisher/doors.h"
#include "fisher/sq_grad_channels_cpu.h"

namespace fastunlearn {
namespace {

// One sample's sums over positions for channels [begin, end), in a fixed order and in blocks, whose
// totals are doubles. `block` is scratch of the same size.
template <typename Scalar>
void sample_sums(const Scalar* grad, const Scalar* normalized, const SqGradChannelsShape& shape,
                 int64_t begin, int64_t end, CpuAccumulator<Scalar>* block, double* sums) {
  auto later = [&](int64_t offset) { return normalized ? normalized + offset : nullptr; };
  if (shape.inner == 1) {
    std::fill(sums, sums + (end - begin), 0.0);
    for (int64_t first = 0; first < shape.outer; first += kSumBlock) {
      const int rows = static_cast<int>(std::min<int64_t>(kSumBlock, shape.outer - first));
      const int64_t at = first * shape.channels + begin;
      std::fill(block, block + (end - begin), CpuAccumulator<Scalar>(0));
      sum_rows_cpu(grad + at, later(at), rows, shape.channels, end - begin, block);
      for (int64_t c = 0; c < end - begin; ++c) sums[c] += block[c];
    }
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    double sum = 0;
    for (int64_t t = 0; t < shape.outer; ++t) {
      const int64_t plane = (t * shape.channels + c) * shape.inner;
      sum += sum_plane_cpu(grad + plane, later(plane), shape.inner);
    }
    sums[c - begin] = sum;
  }
}

template <bool kWithNormalized>
void sq_grad_channels_cpu(const Tensor& out, const ChannelsDoor& door) {
  const SqGradChannelsShape& shape = door.shape;
  dispatch_storage<CpuTypes>(door.grad.scalar_type(), [&]<typename Scalar>() {
    using Acc = CpuAccumulator<Scalar>;
    const auto* grad = static_cast<const Scalar*>(door.grad.const_data_ptr());
    const Scalar* normalized = nullptr;
    if constexpr (kWithNormalized) {
      normalized = static_cast<const Scalar*>(door.normalized->const_data_ptr());
    }
    Acc* result = static_cast<Acc*>(out.mutable_data_ptr());
    const int64_t per_sample = shape.outer * shape.channels * shape.inner;
    torch::stable::parallel_for(0, shape.channels, 16, [&](int64_t begin, int64_t end) {
      std::vector<Acc> block(end - begin);
      std::vector<double> sums(end - begin);
      std::vector<LongSum<Acc>> squares(end - begin);
      for (int64_t n = 0; n < shape.samples; ++n) {
        const int64_t offset = n * per_sample;
        sample_sums(grad + offset, kWithNormalized ? normalized + offset : nullptr, shape, begin,
                    end, block.data(), sums.data());
        for (size_t c = 0; c < sums.size(); ++c)
          squares[c].add(static_cast<Acc>(sums[c] * sums[c]));
      }
      for (int64_t c = begin; c < end; ++c) result[c] += squares[c - begin].value();
    });
  });
}

void sq_grad_affine_cpu(const Tensor& out, const Tensor& normalized, const Tensor& grad_output,
                        int64_t channel_dim) {
  sq_grad_channels_cpu<true>(
      out, ChannelsDoor("sq_grad_affine", out, normalized, grad_output, channel_dim));
}

void sq_grad_bias_cpu(const Tensor& out, const Tensor& grad_output, int64_t channel_dim) {
  sq_grad_channels_cpu<false>(
      out, ChannelsDoor("sq_grad_bias", out, std::nullopt, grad_output, channel_dim));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_affine", TORCH_BOX(&sq_grad_affine_cpu));
  m.impl("sq_grad_bias", TORCH_BOX(&sq_grad_bias_cpu));
}

}  // namespace fastunlearn
