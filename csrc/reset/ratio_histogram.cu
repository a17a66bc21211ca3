// ratio_histogram_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "reset/doors.h"
#include "reset/ratio_histogram.cuh"

namespace fastunlearn {
namespace {

void ratio_histogram_cuda(Tensor counts, const std::vector<Tensor>& forget,
                          const std::vector<Tensor>& retain, const Tensor& eps,
                          const Tensor& prefix, int64_t level) {
  RatioHistogramDoor door(counts, forget, retain, eps, prefix, level);
  const DeviceStream device(counts);
  const Importances& importances = door.importances;
  for (const ListLaunch& launch : plan_tensor_list(importances.sizes)) {
    door.params.list =
        pack<kHistogramPointers>(launch, [&](int64_t i) -> ListEntry<kHistogramPointers> {
          const ElementType type = element_type(importances.forget[i]);
          return {{importances.forget[i].data_ptr(), importances.retain[i].data_ptr()},
                  importances.sizes[i],
                  type,
                  type};
        });
    device.launch("ratio_histogram_", ratio_histogram_kernel, launch.blocks, dim3(kListThreads),
                  door.params);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("ratio_histogram_", TORCH_BOX(&ratio_histogram_cuda));
}

}  // namespace fastunlearn
