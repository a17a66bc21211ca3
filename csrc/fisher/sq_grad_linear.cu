// sq_grad_linear on CUDA.
#include "fisher/sq_grad_launch.cuh"
#include "fisher/sq_grad_linear.cuh"
#include "fisher/sq_grad_wgmma_launch.h"

namespace fastunlearn {

namespace {

void sq_grad_linear_cuda(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                         bool allow_tf32) {
  const LinearDoor door(out, input, grad_output);
  const SqGradShape& s = door.shape;
  if (out.numel() == 0 || s.samples == 0 || s.positions == 0) return;
#ifdef FASTUNLEARN_SM90A
  if (launch_sq_grad_wgmma(out, door)) return;
#endif
  dispatch_storage<CudaTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const DeviceStream device(out);
    const SqGradPlan plan = plan_sq_grad(s, false, use_tensor_cores<Scalar>(allow_tf32), device);
    const Scalar* grads = data<Scalar>(door.grad);
    const Scalar* inputs = data<Scalar>(door.input);
    const RowOperand<Scalar> grad_rows{grads, s.positions, s.out_features};
    const RowOperand<Scalar> input_rows{inputs, s.positions, s.in_features};
    const RunOperand<Scalar, false> grad_runs(grads, 1, s.positions, s.out_features);
    const RunOperand<Scalar, false> input_runs(inputs, 1, s.positions, s.in_features);
    switch (plan.kernel) {
      case SqGradKernel::kSimt:
        return launch_sq_grad_tile<false, Scalar>(device, out, s, plan, grad_rows, input_rows);
      case SqGradKernel::kPointwise:
        return launch_sq_grad_tile<true, Scalar>(device, out, s, plan, grad_rows, input_rows);
      case SqGradKernel::kMma:
        return launch_sq_grad_mma<SqGradMma, Scalar>(device, out, s, plan, grad_runs, input_runs);
      case SqGradKernel::kMmaWide:
        return launch_sq_grad_mma<SqGradMmaWide, Scalar>(device, out, s, plan, grad_runs,
                                                         input_runs);
      case SqGradKernel::kDirect:
      case SqGradKernel::kMmaTall:
        break;  // for convolutions
    }
    check(false, "sq_grad_linear: no kernel for this plan");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("sq_grad_linear", TORCH_BOX(&sq_grad_linear_cuda));
}

}  // namespace fastunlearn
