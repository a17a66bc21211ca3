// mask_grads_ and the masked optimizer steps on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "reset/doors.h"
#include "reset/masked_step.cuh"

namespace fastunlearn {
namespace {

void mask_grads_cuda(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks) {
  const MaskDoor door("mask_grads_", "gradients", grads, masks);
  if (grads.empty()) return;
  const DeviceStream device(grads[0]);
  for (const ListLaunch& launch : plan_tensor_list(door.sizes)) {
    MaskGradsParams params{};
    params.list = pack<kMaskPointers>(launch, [&](int64_t i) -> ListEntry<kMaskPointers> {
      const ElementType type = element_type(grads[i]);
      return {{grads[i].mutable_data_ptr(), door.masks[i].data_ptr()}, door.sizes[i], type, type};
    });
    device.launch("mask_grads_", mask_grads_kernel, launch.blocks, dim3(kListThreads), params);
  }
}

template <typename Rule>
void masked_step(const char* op, const MaskedStepDoor& door, const std::vector<Tensor>& weights,
                 const std::vector<Tensor>& starts, const std::vector<Tensor>& first,
                 const std::vector<Tensor>* second, const Rule& rule) {
  if (weights.empty()) return;
  const DeviceStream device(weights[0]);
  MaskedStepParams<Rule> params{};
  params.rule = rule;
  for (const ListLaunch& launch : plan_tensor_list(door.sizes)) {
    params.list = pack<kStepPointers>(launch, [&](int64_t i) -> ListEntry<kStepPointers> {
      const ElementType type = element_type(weights[i]);
      return {{weights[i].mutable_data_ptr(), door.grads[i].data_ptr(), door.masks[i].data_ptr(),
               starts[i].data_ptr(), first[i].mutable_data_ptr(),
               second ? (*second)[i].mutable_data_ptr() : nullptr},
              door.sizes[i],
              type,
              type};
    });
    device.launch(op, masked_step_kernel<Rule>, launch.blocks, dim3(kListThreads), params);
  }
}

void masked_sgd_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                     const std::vector<Tensor>& masks, const std::vector<Tensor>& starts,
                     const std::vector<Tensor>& buffers, double lr, double momentum,
                     double weight_decay, bool nesterov) {
  const MaskedStepDoor door("masked_sgd_", weights, grads, masks, starts,
                            {{"momentum_buffers", &buffers}}, momentum == 0);
  masked_step("masked_sgd_", door, weights, starts, buffers, nullptr,
              SgdRule{lr, momentum, weight_decay, nesterov});
}

void masked_adamw_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                       const std::vector<Tensor>& masks, const std::vector<Tensor>& starts,
                       const std::vector<Tensor>& means, const std::vector<Tensor>& squares,
                       double lr, double beta1, double beta2, double eps, double weight_decay,
                       int64_t step) {
  const MaskedStepDoor door("masked_adamw_", weights, grads, masks, starts,
                            {{"means", &means}, {"squares", &squares}});
  masked_step("masked_adamw_", door, weights, starts, means, &squares,
              adamw_rule(lr, beta1, beta2, eps, weight_decay, step));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("mask_grads_", TORCH_BOX(&mask_grads_cuda));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_cuda));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_cuda));
}

}  // namespace fastunlearn
