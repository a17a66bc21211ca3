// sq_grad_linear on a CPU.
#include <torch/csrc/stable/library.h>

#include "common/dispatch.h"
#include "fisher/doors.h"
#include "fisher/sq_grad_tile_cpu.h"

namespace fastunlearn {
namespace {

// [N, T, features], features contiguous.
template <typename Scalar>
struct RowPacker {
  const Scalar* data;
  int64_t positions, features;

  template <int kWidth>
  void operator()(const PanelRequest& request, CpuAccumulator<Scalar>* panel) const {
    // One position per sample: consecutive samples are consecutive rows too.
    const Scalar* row =
        data + (request.sample * positions + request.position) * features + request.feature;
    for (int k = 0; k < request.depth; ++k, row += features, panel += kWidth) {
      for (int j = 0; j < request.features; ++j) panel[j] = widen(row[j]);
    }
  }
};

void sq_grad_linear_cpu(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                        bool /*allow_tf32*/) {
  const LinearDoor door(out, input, grad_output);
  dispatch_storage<CpuTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const SqGradShape& s = door.shape;
    const RowPacker<Scalar> grads{static_cast<const Scalar*>(door.grad.const_data_ptr()),
                                  s.positions, s.out_features};
    const RowPacker<Scalar> inputs{static_cast<const Scalar*>(door.input.const_data_ptr()),
                                   s.positions, s.in_features};
    sq_grad_cpu(s, grads, inputs, static_cast<CpuAccumulator<Scalar>*>(out.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_linear", TORCH_BOX(&sq_grad_linear_cpu));
}

}  // namespace fastunlearn
