// sq_grad_affine and sq_grad_bias on CUDA.
#include "fisher/sq_grad_channels.cuh"
#include "fisher/sq_grad_launch.cuh"

namespace fastunlearn {
namespace {

template <bool kWithNormalized>
void launch_sq_grad_channels(const Tensor& out, const ChannelsDoor& door) {
  const SqGradChannelsShape& shape = door.shape;
  if (out.numel() == 0 || door.grad.numel() == 0) return;
  const DeviceStream device(out);
  const SqGradChannelsPlan plan = plan_sq_grad_channels(shape, device.multiprocessors());
  dispatch_storage<CudaTypes>(door.grad.scalar_type(), [&]<typename Scalar>() {
    using Acc = Accumulator<Scalar>;
    auto kernel = shape.inner == 1 ? sq_grad_channels_last_kernel<kWithNormalized, Scalar>
                                   : sq_grad_channels_inner_kernel<kWithNormalized, Scalar>;
    const Scalar* normalized = kWithNormalized ? data<Scalar>(*door.normalized) : nullptr;
    with_splits<Acc>(device, out, plan.splits, [&](Acc* target) {
      device.launch("sq_grad_channels", kernel, plan.blocks, dim3(kChannelLanes * kChannelRows),
                    data<Scalar>(door.grad), normalized, shape, plan, target);
    });
  });
}

void sq_grad_affine_cuda(const Tensor& out, const Tensor& normalized, const Tensor& grad_output,
                         int64_t channel_dim) {
  launch_sq_grad_channels<true>(
      out, ChannelsDoor("sq_grad_affine", out, normalized, grad_output, channel_dim));
}

void sq_grad_bias_cuda(const Tensor& out, const Tensor& grad_output, int64_t channel_dim) {
  launch_sq_grad_channels<false>(
      out, ChannelsDoor("sq_grad_bias", out, std::nullopt, grad_output, channel_dim));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("sq_grad_affine", TORCH_BOX(&sq_grad_affine_cuda));
  m.impl("sq_grad_bias", TORCH_BOX(&sq_grad_bias_cuda));
}

}  // namespace fastunlearn
