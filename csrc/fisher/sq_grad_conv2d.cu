// sq_grad_conv2d on CUDA.
#include "fisher/sq_grad_conv2d.cuh"
#include "fisher/sq_grad_launch.cuh"

namespace fastunlearn {

namespace {

void sq_grad_conv2d_cuda(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dDoor door(out, input, grad_output, stride, padding, dilation, groups);
  dispatch_storage<CudaTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const SqGradShape& s = door.shape;
    launch_sq_grad<Scalar>(
        out, s,
        PlaneOperand<Scalar>{data<Scalar>(door.grad), static_cast<int>(s.groups),
                             static_cast<int>(s.out_features), static_cast<int>(s.positions)},
        PatchOperand<Scalar>{data<Scalar>(door.input), static_cast<int>(s.groups), door.geometry});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("sq_grad_conv2d", TORCH_BOX(&sq_grad_conv2d_cuda));
}

}  // namespace fastunlearn
