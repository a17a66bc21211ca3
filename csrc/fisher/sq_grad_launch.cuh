// Host side of the tiled kernels: plan, workspace, launch, and the ordered sum of the splits.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "fisher/doors.h"
#include "fisher/sq_grad_tile.cuh"

namespace fastunlearn {

template <typename Scalar>
const Scalar* data(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}

// Runs kernel(target), where target is `out` itself or a workspace [splits, out] that is then added
// to it.
template <typename Acc, typename Kernel>
void with_splits(const DeviceStream& device, const Tensor& out, int64_t splits,
                 const Kernel& kernel) {
  Acc* result = static_cast<Acc*>(out.mutable_data_ptr());
  if (splits == 1) return kernel(result);
  const int64_t count = out.numel();
  const std::array<int64_t, 2> size{splits, count};
  const Tensor workspace = torch::stable::new_empty(out, {size.data(), size.size()});
  Acc* partial = static_cast<Acc*>(workspace.mutable_data_ptr());
  kernel(partial);
  device.launch("add_splits", add_splits_kernel<Acc>, ceil_div(count, kReduceThreads),
                dim3(kReduceThreads), result, partial, splits, count);
}

template <typename Scalar, typename GradOperand, typename InputOperand>
void launch_sq_grad(const Tensor& out, const SqGradShape& shape, const GradOperand& grad,
                    const InputOperand& input) {
  using Acc = Accumulator<Scalar>;
  if (out.numel() == 0 || shape.samples == 0 || shape.positions == 0) return;
  const DeviceStream device(out);
  const SqGradPlan plan = plan_sq_grad(shape, device.multiprocessors());
  auto kernel = shape.positions == 1 ? sq_grad_kernel<true, Acc, GradOperand, InputOperand>
                                     : sq_grad_kernel<false, Acc, GradOperand, InputOperand>;
  with_splits<Acc>(device, out, plan.splits, [&](Acc* target) {
    device.launch("sq_grad", kernel, plan.blocks, dim3(kTileThreads), grad, input, shape, plan,
                  target);
  });
}

}  // namespace fastunlearn
