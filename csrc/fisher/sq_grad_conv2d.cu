// sq_grad_conv2d on CUDA.
#include "fisher/sq_grad_conv2d.cuh"
#include "fisher/sq_grad_direct.cuh"
#include "fisher/sq_grad_launch.cuh"

namespace fastunlearn {

namespace {

// A patch is one pixel, so that the planes of the image are the operand as they lie.
bool is_pixelwise(const Conv2dGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.padding_h == 0 && g.padding_w == 0;
}

void sq_grad_conv2d_cuda(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation, int64_t groups, bool allow_tf32) {
  const Conv2dDoor door(out, input, grad_output, stride, padding, dilation, groups);
  const SqGradShape& s = door.shape;
  if (out.numel() == 0 || s.samples == 0 || s.positions == 0) return;
  dispatch_storage<CudaTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const DeviceStream device(out);
    const SqGradPlan plan = plan_sq_grad(s, true, use_tensor_cores<Scalar>(allow_tf32), device);
    const Scalar* grads = data<Scalar>(door.grad);
    const Scalar* inputs = data<Scalar>(door.input);
    const PlaneOperand<Scalar> planes{grads, static_cast<int>(s.groups),
                                      static_cast<int>(s.out_features),
                                      static_cast<int>(s.positions)};
    const PatchOperand<Scalar> patches{inputs, static_cast<int>(s.groups), door.geometry};
    const RunOperand<Scalar, true> grad_runs(grads, s.groups, s.out_features, s.positions);
    const RunOperand<Scalar, true> input_runs(inputs, s.groups, s.in_features, s.positions);
    switch (plan.kernel) {
      case SqGradKernel::kSimt:
        return launch_sq_grad_tile<false, Scalar>(device, out, s, plan, planes, patches);
      case SqGradKernel::kPointwise:
        return launch_sq_grad_tile<true, Scalar>(device, out, s, plan, planes, patches);
      case SqGradKernel::kDirect:
        return with_splits<Accumulator<Scalar>>(
            device, out, plan.splits, [&](Accumulator<Scalar>* target) {
              device.launch(
                  "sq_grad_direct",
                  sq_grad_direct_kernel<Scalar, PlaneOperand<Scalar>, PatchOperand<Scalar>>,
                  plan.blocks, dim3(kDirectThreads), planes, patches, s, plan, target);
            });
      case SqGradKernel::kMma:
        if (is_pixelwise(door.geometry)) {
          return launch_sq_grad_mma<SqGradMma, Scalar>(device, out, s, plan, grad_runs, input_runs);
        }
        return launch_sq_grad_mma<SqGradMma, Scalar>(device, out, s, plan, grad_runs, patches);
      case SqGradKernel::kMmaTall:
        if (is_pixelwise(door.geometry)) {
          return launch_sq_grad_mma<SqGradMmaTall, Scalar>(device, out, s, plan, grad_runs,
                                                           input_runs);
        }
        return launch_sq_grad_mma<SqGradMmaTall, Scalar>(device, out, s, plan, grad_runs, patches);
      case SqGradKernel::kMmaWide:
        break;  // for rows of features
    }
    check(false, "sq_grad_conv2d: no kernel for this plan");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("sq_grad_conv2d", TORCH_BOX(&sq_grad_conv2d_cuda));
}

}  // namespace fastunlearn
