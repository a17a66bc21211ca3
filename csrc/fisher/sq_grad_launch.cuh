// Host side of the tiled kernels: plan, workspace, launch, and the ordered sum of the splits.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/splits.cuh"
#include "fisher/doors.h"
#include "fisher/sq_grad_mma.cuh"
#include "fisher/sq_grad_tile.cuh"

namespace fastunlearn {

// Whether inputs of this type go to the tensor cores. fp32 only where TF32 is good enough; fp64 has
// no such path here.
template <typename Scalar>
bool use_tensor_cores(bool allow_tf32) {
  return sizeof(Scalar) == 2 || (sizeof(Scalar) == 4 && allow_tf32);
}

inline SqGradPlan plan_sq_grad(const SqGradShape& shape, bool convolution, bool tensor_cores,
                               const DeviceStream& device) {
  return plan_sq_grad(shape, convolution, tensor_cores,
                      SqGradDevice{device.multiprocessors(), device.max_shared_bytes()});
}

template <bool kPointwise, typename Scalar, typename GradOperand, typename InputOperand>
void launch_sq_grad_tile(const DeviceStream& device, const Tensor& out, const SqGradShape& shape,
                         const SqGradPlan& plan, const GradOperand& grad,
                         const InputOperand& input) {
  using Acc = Accumulator<Scalar>;
  if constexpr (kPointwise || sizeof(Scalar) > 2) {
    with_splits<Acc>(device, out, plan.splits, [&](Acc* target) {
      device.launch("sq_grad", sq_grad_kernel<kPointwise, Acc, GradOperand, InputOperand>,
                    plan.blocks, dim3(kTileThreads), grad, input, shape, plan, target);
    });
  } else {
    check(false, "sq_grad: 16-bit inputs go to the tensor cores");  // the planner knows
  }
}

template <typename Tile, typename Scalar, typename GradOperand, typename InputOperand>
void launch_sq_grad_mma(const DeviceStream& device, const Tensor& out, const SqGradShape& shape,
                        const SqGradPlan& plan, const GradOperand& grad,
                        const InputOperand& input) {
  if constexpr (sizeof(Scalar) <= 4) {
    with_splits<float>(device, out, plan.splits, [&](float* target) {
      device.launch_shared(
          "sq_grad_mma", sq_grad_mma_kernel<Tile, Scalar, GradOperand, InputOperand>, plan.blocks,
          dim3(Tile::kThreads), Tile::kSharedBytes(GradOperand::kPositionsContiguous), grad, input,
          shape, plan, target);
    });
  } else {
    check(false, "sq_grad: tensor cores do not multiply float64 here");  // the planner knows
  }
}

}  // namespace fastunlearn
