// sq_grad_affine and sq_grad_bias on a CPU.
#include "fisher/sq_grad_channels.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/block_sum.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "fisher/doors.h"

namespace fastunlearn {
namespace {

// One sample's sums over positions, in a fixed order. Blocks of positions keep the rounding error
// down; with positions contiguous, eight interleaved sums let the compiler vectorise without
// reordering anything.
template <bool kWithNormalized, typename Scalar>
void sample_sums(const Scalar* grad, const Scalar* normalized, const SqGradChannelsShape& shape,
                 int64_t begin, int64_t end, CpuAccumulator<Scalar>* block,
                 CpuAccumulator<Scalar>* sums) {
  using Acc = CpuAccumulator<Scalar>;
  constexpr int kPartials = 8;
  auto term = [&](int64_t at) -> Acc {
    const Acc g = widen(grad[at]);
    if constexpr (kWithNormalized) return g * widen(normalized[at]);
    return g;
  };
  if (shape.inner == 1) {
    std::fill(sums, sums + (end - begin), Acc(0));
    for (int64_t first = 0; first < shape.outer; first += kSumBlock) {
      std::fill(block, block + (end - begin), Acc(0));
      for (int64_t t = first; t < std::min(shape.outer, first + kSumBlock); ++t) {
        for (int64_t c = begin; c < end; ++c) block[c - begin] += term(t * shape.channels + c);
      }
      for (int64_t c = 0; c < end - begin; ++c) sums[c] += block[c];
    }
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    BlockSum<Acc> partial[kPartials];
    for (int64_t t = 0; t < shape.outer; ++t) {
      const int64_t plane = (t * shape.channels + c) * shape.inner;
      int64_t s = 0;
      for (; s + kPartials <= shape.inner; s += kPartials) {
        for (int i = 0; i < kPartials; ++i) partial[i].add(term(plane + s + i));
      }
      for (int i = 0; s < shape.inner; ++s, ++i) partial[i].add(term(plane + s));
    }
    Acc sum = 0;
    for (const BlockSum<Acc>& part : partial) sum += part.value();
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
      std::vector<Acc> block(end - begin), sums(end - begin);
      std::vector<BlockSum<Acc>> squares(end - begin);
      for (int64_t n = 0; n < shape.samples; ++n) {
        const int64_t offset = n * per_sample;
        sample_sums<kWithNormalized>(grad + offset, kWithNormalized ? normalized + offset : nullptr,
                                     shape, begin, end, block.data(), sums.data());
        for (size_t c = 0; c < sums.size(); ++c) squares[c].add(sums[c] * sums[c]);
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
