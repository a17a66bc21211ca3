// threshold_reset_ and mask_grads_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "reset/doors.h"
#include "reset/threshold_reset.cuh"

namespace fastunlearn {
namespace {

// Fills a launch's arguments; entry_of(i) describes the caller's tensor i.
template <int kPointers, typename EntryOf>
TensorList<kPointers> pack(const ListLaunch& launch, const EntryOf& entry_of) {
  TensorList<kPointers> list = {};
  for (const int64_t tensor : launch.tensors) {
    const int32_t i = list.count++;
    list.entries[i] = entry_of(tensor);
    list.first_tensor[i] = static_cast<int32_t>(tensor);
    list.first_block[i + 1] =
        list.first_block[i] + static_cast<int32_t>(list_blocks(list.entries[i].size));
  }
  return list;
}

void threshold_reset_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget,
                          const std::vector<Tensor>& retain, double gamma,
                          const std::vector<Tensor>& masks, Tensor counts) {
  const ThresholdDoor door(weights, forget, retain, gamma, masks, counts);
  const DeviceStream device(counts);
  torch::stable::zero_(counts);
  for (const ListLaunch& launch : plan_tensor_list(door.sizes)) {
    ThresholdResetParams params{};
    params.list = pack<kThresholdPointers>(launch, [&](int64_t i) -> ListEntry<kThresholdPointers> {
      return {{weights[i].mutable_data_ptr(), door.forget[i].data_ptr(), door.retain[i].data_ptr(),
               masks[i].mutable_data_ptr()},
              door.sizes[i],
              static_cast<int32_t>(weights[i].element_size()),
              door.forget[i].scalar_type() == ScalarType::Double};
    });
    params.gamma = gamma;
    params.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
    device.launch("threshold_reset_", threshold_reset_kernel, launch.blocks, dim3(kListThreads),
                  params);
  }
}

void mask_grads_cuda(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks) {
  const MaskGradsDoor door(grads, masks);
  if (grads.empty()) return;
  const DeviceStream device(grads[0]);
  for (const ListLaunch& launch : plan_tensor_list(door.sizes)) {
    MaskGradsParams params{};
    params.list = pack<kMaskPointers>(launch, [&](int64_t i) -> ListEntry<kMaskPointers> {
      return {{grads[i].mutable_data_ptr(), door.masks[i].data_ptr()},
              door.sizes[i],
              static_cast<int32_t>(grads[i].element_size()),
              0};
    });
    device.launch("mask_grads_", mask_grads_kernel, launch.blocks, dim3(kListThreads), params);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("threshold_reset_", TORCH_BOX(&threshold_reset_cuda));
  m.impl("mask_grads_", TORCH_BOX(&mask_grads_cuda));
}

}  // namespace fastunlearn
