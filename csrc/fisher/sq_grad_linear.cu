// sq_grad_linear on CUDA.
#include "fisher/sq_grad_launch.cuh"
#include "fisher/sq_grad_linear.cuh"
#include "fisher/sq_grad_wgmma_launch.h"

namespace fastunlearn {

namespace {

void sq_grad_linear_cuda(const Tensor& out, const Tensor& input, const Tensor& grad_output) {
  const LinearDoor door(out, input, grad_output);
#ifdef FASTUNLEARN_SM90A
  if (launch_sq_grad_wgmma(out, door)) return;
#endif
  dispatch_storage<CudaTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const SqGradShape& s = door.shape;
    launch_sq_grad<Scalar>(
        out, s, RowOperand<Scalar>{data<Scalar>(door.grad), s.positions, s.out_features},
        RowOperand<Scalar>{data<Scalar>(door.input), s.positions, s.in_features});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("sq_grad_linear", TORCH_BOX(&sq_grad_linear_cuda));
}

}  // namespace fastunlearn
