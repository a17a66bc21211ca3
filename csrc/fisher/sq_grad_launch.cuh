// Host side of the tiled kernels: plan, workspace, launch, and the ordered sum of the splits.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/splits.cuh"
#include "fisher/doors.h"
#include "fisher/sq_grad_tile.cuh"

namespace fastunlearn {

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
