// threshold_reset_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "reset/doors.h"
#include "reset/threshold_reset.cuh"

namespace fastunlearn {
namespace {

void threshold_reset_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget,
                          const std::vector<Tensor>& retain, const Tensor& rules, int64_t mode,
                          double dampening, const std::vector<Tensor>& initial,
                          const std::vector<Tensor>& masks, Tensor counts) {
  const ThresholdDoor door(weights, forget, retain, rules, mode, initial, masks, counts);
  const DeviceStream device(counts);
  torch::stable::zero_(counts);
  ThresholdResetParams params{};
  params.rules = static_cast<const double*>(rules.const_data_ptr());
  params.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  params.dampening = dampening;
  params.mode = static_cast<ResetMode>(mode);
  const Importances& importances = door.importances;
  for (const ListLaunch& launch : plan_tensor_list(importances.sizes)) {
    params.list = pack<kThresholdPointers>(launch, [&](int64_t i) -> ListEntry<kThresholdPointers> {
      return {{weights[i].mutable_data_ptr(), importances.forget[i].data_ptr(),
               importances.retain[i].data_ptr(), masks[i].mutable_data_ptr(),
               mode == kInit ? door.initial[i].data_ptr() : nullptr},
              importances.sizes[i],
              element_type(weights[i]),
              element_type(importances.forget[i])};
    });
    device.launch("threshold_reset_", threshold_reset_kernel, launch.blocks, dim3(kListThreads),
                  params);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("threshold_reset_", TORCH_BOX(&threshold_reset_cuda));
}

}  // namespace fastunlearn
